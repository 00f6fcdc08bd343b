"""Options of a run: sampling (`Sampling`), where it ends (`Limits`), how long it may think (`Thinking`), and what every
step shows besides (`Inspect`); and the first three as JSON values for traces, receipts and saved runs.

A field left at None takes the model's own value (its generation_config.json), and what that does not say takes the
neutral value below, so every default stands once. Everything is checked when the object is made: an option that cannot
be honoured is refused before a weight is read.

Does not: read files, hold arrays, or check ids against a vocabulary (the sampler and the reasoner do, they know it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from qwq_mlx.errors import OptionError, SourceError
from qwq_mlx.files.json_dataclass import from_json_value

__all__ = [
    "CUE_PATIENCE",
    "LOOP_ACTIONS",
    "MAX_SAMPLES",
    "NEUTRAL",
    "Inspect",
    "Limits",
    "Sampling",
    "Settings",
    "Thinking",
    "from_json",
    "to_json",
]

MAX_SAMPLES = 1_000
"""Samples that a vote may have."""
LOOP_ACTIONS = ("answer", "stop", "nudge", "off")

CUE_PATIENCE = 64
"""Tokens that the answer cue waits at most for the end of a sentence (see `cue`)."""

_MAX_SEED = 2**64 - 1  # mlx.random.key takes an unsigned 64-bit number
_MAX_ID = 2**31 - 1
_LARGEST = 1e308  # about the largest float; Python's integers have no end


def _number(name: str, value: Any, *, low: float, high: float, low_open: bool = False) -> None:
    if value is None:
        return
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and (low < value if low_open else low <= value) and value <= high:
        return
    expected = f"a number {'above' if low_open else 'from'} {low:g} {'up ' if low_open else ''}to {high:g}"
    raise OptionError(f"{name} is {value!r}, expected {expected}.")


def _whole(name: str, value: Any, *, low: int, high: int) -> None:
    if value is None or (type(value) is int and low <= value <= high):
        return
    is_too_large = type(value) is int and value > high
    tells_high = high != _MAX_ID or is_too_large  # a limit that nobody meets is told to who exceeds it alone
    expected = f"a whole number from {low} to {high:,}" if tells_high else f"a whole number of at least {low}"
    raise OptionError(f"{name} is {value!r}, expected {expected}.")


def _texts(name: str, value: Any) -> None:
    if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value):
        raise OptionError(f"{name} is {value!r}, expected a tuple of texts, for example ('END',).")
    if "" in value:
        raise OptionError(f"{name} holds an empty text, which would match everywhere; leave it out.")


def _bias(bias: Any) -> None:
    if not isinstance(bias, Mapping):
        raise OptionError(f"logit_bias is {bias!r}, expected a mapping of id to number, for example {{198: -5.0}}.")
    for token_id, value in bias.items():
        if type(token_id) is not int or not 0 <= token_id <= _MAX_ID:
            raise OptionError(f"logit_bias has the key {token_id!r}, expected a token id (a whole number from 0).")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not (value == -math.inf or -_LARGEST <= value <= _LARGEST):
            raise OptionError(f"logit_bias[{token_id}] is {value!r}, expected a finite number, or -inf to ban the id.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next id is drawn. None: the model's own value (`resolve`).

    temperature: 0 is greedy (the most likely id).
    top_p: keep the smallest set of ids that holds this share of the probability, in (0, 1].
    top_k: keep the k most likely ids; 0 keeps all.
    min_p: drop ids below this share of the most likely one's probability, in [0, 1].
    repetition_penalty: as in transformers, over prompt and output; 1 is off.
    presence_penalty: as in vLLM, over the output alone; 0 is off.
    frequency_penalty: as in vLLM, over the output alone; 0 is off.
    dry_multiplier: strength of DRY, which penalises tokens that would extend a repeated sequence; 0 is off. The penalty
      of an id that would extend a repeat of n ids is dry_multiplier * dry_base ** (n - dry_allowed_length).
    dry_base: growth of that penalty per id.
    dry_allowed_length: repeats up to this length are not penalised.
    dry_range: how many of the last ids are looked at; 0 is all.
    dry_breakers: texts that a repeat does not cross.
    logit_bias: id -> number added to its logit; -inf bans the id, +inf is refused.
    order: "hf" is temperature, top-k, top-p, min-p as in transformers and vLLM; "mlx-lm" is mlx-lm's own order.
    seed: None draws one; the one that was used stands in the Trace's settings.

    >>> greedy = qwq_mlx.Sampling(temperature=0)
    >>> greedy.is_greedy, greedy.top_p
    (True, None)
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_range: int = 0
    dry_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    order: Literal["hf", "mlx-lm"] = "hf"
    seed: int | None = None

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, low=0.0, high=100.0)
        _number("top_p", self.top_p, low=0.0, high=1.0, low_open=True)
        _whole("top_k", self.top_k, low=0, high=_MAX_ID)
        _number("min_p", self.min_p, low=0.0, high=1.0)
        _number("repetition_penalty", self.repetition_penalty, low=0.0, high=100.0, low_open=True)
        _number("presence_penalty", self.presence_penalty, low=-100.0, high=100.0)
        _number("frequency_penalty", self.frequency_penalty, low=-100.0, high=100.0)
        _number("dry_multiplier", self.dry_multiplier, low=0.0, high=100.0)
        _number("dry_base", self.dry_base, low=1.0, high=100.0)
        _whole("dry_allowed_length", self.dry_allowed_length, low=1, high=_MAX_ID)
        _whole("dry_range", self.dry_range, low=0, high=_MAX_ID)
        _texts("dry_breakers", self.dry_breakers)
        _bias(self.logit_bias)
        if self.order not in ("hf", "mlx-lm"):
            raise OptionError(f"order is {self.order!r}, expected 'hf' (transformers, vLLM) or 'mlx-lm'.")
        _whole("seed", self.seed, low=0, high=_MAX_SEED)

    def resolve(self, model: Sampling) -> Sampling:
        """Every None filled, from the model's own values first and `NEUTRAL` after. The seed stays as it is.

        >>> qwq_mlx.Sampling(top_p=0.5).resolve(qwq_mlx.Sampling(temperature=0.7)).temperature
        0.7
        """
        filled: dict[str, Any] = {}
        for name in (each.name for each in fields(self) if each.name != "seed"):
            if getattr(self, name) is None:
                own = getattr(model, name)
                filled[name] = getattr(NEUTRAL, name) if own is None else own
        return replace(self, **filled)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely id is always taken."""
        return self.temperature == 0.0


NEUTRAL = Sampling(
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
)
"""Values that change nothing: what a field takes when neither the caller nor the model says anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Where a run ends.

    max_tokens: ids to produce at most; None is the room left in the context.
    context: positions to use at most, prompt included; None is the model's own (max_position_embeddings).
    stop: texts that end the run; they are not part of the text.
    banned: texts that are never written.
    language_guard: write no letters of scripts that the question does not use, except in quotations, formulas and
      brackets. Latin and Greek letters, digits, punctuation and symbols stay allowed.
    prefill_step: prompt ids per prefill pass.
    kv_bits: 8 or 4 quantize the KV cache in groups of 64, at some cost in quality; None keeps the compute type, "auto"
      quantizes where the context would not fit the memory otherwise.

    >>> trace = reasoner.generate("How many r in strawberry.", limits=qwq_mlx.Limits(max_tokens=20, stop=("letter",)))
    >>> trace.text
    'I go through strawberry '
    """

    max_tokens: int | None = None
    context: int | None = None
    stop: tuple[str, ...] = ()
    banned: tuple[str, ...] = ()
    language_guard: bool = False
    prefill_step: int = 2048
    kv_bits: Literal[8, 4, "auto"] | None = None

    def __post_init__(self) -> None:
        _whole("max_tokens", self.max_tokens, low=1, high=_MAX_ID)
        _whole("context", self.context, low=2, high=_MAX_ID)
        _texts("stop", self.stop)
        _texts("banned", self.banned)
        if not isinstance(self.language_guard, bool):
            raise OptionError(f"language_guard is {self.language_guard!r}, expected True or False.")
        _whole("prefill_step", self.prefill_step, low=1, high=_MAX_ID)
        if self.kv_bits not in (None, 8, 4, "auto"):
            raise OptionError(f"kv_bits is {self.kv_bits!r}, expected 8, 4, 'auto' or None.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """When the thinking must end and the answer be given.

    think_tokens: ids of thinking after which the answer is asked for, at the next end of a sentence; None is no budget.
    answer_tokens: ids that the answer may have once it was asked for.
    on_loop: what to do when the text loops: "answer" asks for the answer, "stop" ends the run, "nudge" goes back before
      the loop and draws with a higher temperature for a while, "off" does not look.

    What an alarm may cost: the answer, where the text would have come to it; after the cue the model answers from what
    stands there. Of 266 recorded outputs of QwQ-32B-Preview that ended, one has an alarm (at token 1,624, for an
    approach that it really repeats eight times), of 224 regular texts such as matrices and tables none.

    What waiting costs, in tokens from the loop's start: a sentence three repetitions and 48 tokens; numbered lines and
    words drawn at random 110 to 310; numbers, cells and code, which repeat for good reasons, 400, or up to 2,048 where
    rows are long or the question names a number; one number, or digits in groups, 400; numbers with other marks between
    them on one line 1,024. Without an action a loop costs all that is left of max_tokens, and no answer.
    So the default is "answer"; for long tables or lists that are asked for, "off" is safer.

    >>> trace = reasoner.generate("How many r in strawberry.", thinking=qwq_mlx.Thinking(think_tokens=10))
    >>> trace.finish_reason, trace.injections[0].text.strip()
    ('budget', '**Final Answer**')
    """

    think_tokens: int | None = None
    answer_tokens: int = 1024
    on_loop: Literal["answer", "stop", "nudge", "off"] = "answer"

    def __post_init__(self) -> None:
        _whole("think_tokens", self.think_tokens, low=0, high=_MAX_ID)
        _whole("answer_tokens", self.answer_tokens, low=1, high=_MAX_ID)
        if self.on_loop not in LOOP_ACTIONS:
            raise OptionError(f"on_loop is {self.on_loop!r}, expected one of {', '.join(LOOP_ACTIONS)}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspect:
    """What every Step carries besides id, text, log-probability and entropy.

    top_k: the k most likely ids in the model's own distribution, with their texts and log-probabilities; 0 is none.
      With them comes the margin, the log-probability of the most likely id minus that of the second.
    hidden_layers: hidden states at the position that the id was drawn from, numbered as in transformers: 0 is the
      embedding, i the output of layer i - 1, the number of layers what the head sees (after the final norm). Each is
      float32 (hidden_size,), 20 KiB a token and layer for QwQ-32B.
    loop_scores: how near the loop detector is to a report.
    entropy: compute it; without it a step is shorter (scripts/measure_step_check.py), and entropies are None.

    >>> run = reasoner.stream("How many r in strawberry.", inspect=qwq_mlx.Inspect(top_k=2, hidden_layers=(0, 8)))
    >>> step = next(run)
    >>> [each.text for each in step.alternatives], step.margin > 0, step.hidden[8].shape
    (['I', ').\\n\\n'], True, (256,))
    """

    top_k: int = 0
    hidden_layers: tuple[int, ...] = ()
    loop_scores: bool = False
    entropy: bool = True

    def __post_init__(self) -> None:
        if type(self.top_k) is not int or self.top_k < 0:
            raise OptionError(f"top_k is {self.top_k!r}, expected a whole number of at least 0; 0 is none.")
        layers: object = self.hidden_layers
        if not isinstance(layers, tuple) or not all(type(layer) is int and layer >= 0 for layer in layers):
            raise OptionError(f"hidden_layers is {layers!r}, expected a tuple of layer numbers, for example (0, 32).")
        if len(set(layers)) != len(layers):
            raise OptionError(f"hidden_layers is {layers!r}, expected each layer once.")
        for name in ("loop_scores", "entropy"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} is {getattr(self, name)!r}, expected True or False.")

    def check(self, *, n_ids: int, n_layers: int, detects_loops: bool) -> None:
        """Refuse what this model and run cannot show. Raises OptionError."""
        if self.top_k > n_ids:
            raise OptionError(f"top_k is {self.top_k:,}, expected at most {n_ids:,}, the ids that the tokenizer has.")
        beyond = [layer for layer in self.hidden_layers if layer > n_layers]
        if beyond:
            raise OptionError(
                f"hidden_layers holds {beyond[0]}, expected numbers from 0 (the embedding) to {n_layers} (after the "
                "final norm)."
            )
        if self.loop_scores and not detects_loops:
            raise OptionError("loop_scores is True, but on_loop is 'off', so nothing looks for loops. Leave one out.")


Settings = tuple[Sampling, Limits, Thinking]
_KINDS: dict[str, type[Sampling | Limits | Thinking]] = {"sampling": Sampling, "limits": Limits, "thinking": Thinking}


def to_json(*options: Sampling | Limits | Thinking) -> dict[str, dict[str, Any]]:
    """By name; JSON knows no tuples, no integer keys and no infinity."""
    names = {kind: name for name, kind in _KINDS.items()}
    return {names[type(each)]: _values(each) for each in options}


def _values(options: Sampling | Limits | Thinking) -> dict[str, Any]:
    values = asdict(options)
    if isinstance(options, Sampling):
        values["logit_bias"] = {str(token_id): str(value) for token_id, value in options.logit_bias.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def from_json(settings: Mapping[str, Any], *, where: str) -> Settings:
    """What `to_json` wrote of all three. Raises SourceError where something else stands there."""
    try:
        sampling = settings["sampling"]
        bias = {token_id: float(value) for token_id, value in sampling["logit_bias"].items()}
        return (
            from_json_value({**sampling, "logit_bias": bias}, Sampling),
            from_json_value(settings["limits"], Limits),
            from_json_value(settings["thinking"], Thinking),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"{where}: the settings cannot be read ({error}). The file is damaged or edited.") from error
