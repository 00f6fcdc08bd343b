"""lm-eval's model class, so that its tasks run on this package: `--model qwq_mlx`. Made for lm-eval 0.4.13.

    python -m qwq_mlx.evaluate.lm_eval --model qwq_mlx --model_args pretrained=DIR --tasks gsm8k --apply_chat_template

lm-eval looks for models in a list of its own, so its command is run from here, once the class is registered. What it is
given is what lm-eval knows: the chat template writes every prompt, of messages where --apply_chat_template makes them,
else of one question. A task's `until` texts ("Q:", say) are looked for in the answer alone, for a thinker writes them
while it thinks; and a text that was cut or went round in a loop is returned empty, because its last number would be
scored as an answer.

Does not: give log-likelihoods, which multiple-choice and perplexity tasks ask for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from qwq_mlx.errors import BatchError, OptionError
from qwq_mlx.evaluate.judge import ending_of
from qwq_mlx.generate.batch import question_seed
from qwq_mlx.generate.reasoner import load
from qwq_mlx.model.prompt import Messages
from qwq_mlx.options import Limits, Sampling, Thinking
from qwq_mlx.progress import ProgressBar
from qwq_mlx.trace.trace import Trace

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError("lm_eval is not installed. Install the version this was made for: lm_eval==0.4.13") from error

__all__ = ["QwqMlxLM", "returned_text"]

_CHAT = "qwq_mlx messages: "  # marks a prompt that is messages as JSON; lm-eval knows texts only
_SETTINGS = ("temperature", "top_p", "top_k", "min_p")
_MAX_TOKENS = 4096


@register_model("qwq_mlx")  # type: ignore[misc,unused-ignore]
class QwqMlxLM(LM):  # type: ignore[misc,unused-ignore]
    """A model of this package for lm-eval's generative tasks.

    pretrained: model folder; None takes the default model.
    max_tokens: of each text, where the task does not say `max_gen_toks`.
    think_tokens: thinking budget, after which the answer is asked for; None is none.
    width: texts side by side; None takes batch_size, else what the memory plan allows, at most 8.
    seed: text i is drawn with a seed made of it and i.
    batch_size, max_batch_size, device: what lm-eval passes to every model; a batch_size above 1 is the width.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        max_tokens: int = _MAX_TOKENS,
        think_tokens: int | None = None,
        width: int | None = None,
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        self._reasoner = load(pretrained)
        self._max_tokens, self._seed = max_tokens, seed
        self._thinking = Thinking(think_tokens=think_tokens, on_loop="stop" if think_tokens is None else "answer")
        is_number = str(batch_size).isdecimal() and int(str(batch_size)) > 1
        self._width = int(str(batch_size)) if width is None and is_number else width

    @property
    def tokenizer_name(self) -> str:
        """The model's name, for lm-eval's caches."""
        return str(self._reasoner.model.name)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The text of the model's chat template, which lm-eval writes into its results."""
        return self._reasoner.model.tokenizer.chat_template or ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as JSON; the template is applied where they become ids, so that no text can become a control
        token. Raises OptionError where the answer is to be begun for the model."""
        if not add_generation_prompt:
            raise OptionError("The task begins the answer for the model (gen_prefix). Choose a task without.")
        return _CHAT + json.dumps(chat_history, ensure_ascii=False)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers to lm-eval's requests, each with its context and its generation settings."""
        settings = [self._settings(request.args[1], place) for place, request in enumerate(requests)]
        with ProgressBar(unit="text", is_shown=not disable_tqdm) as bar:
            try:
                traces: Sequence[Trace] = self._reasoner.batch_generate(
                    [_messages(request.args[0]) for request in requests],
                    sampling=[sampling for sampling, _, _ in settings],
                    limits=[limits for _, limits, _ in settings],
                    thinking=self._thinking,
                    width=self._width,
                    progress=lambda n_ended, n_tokens: bar.show("answering", n_ended, len(requests)),
                )
                failed: Mapping[int, Any] = {}
            except BatchError as error:
                traces, failed = cast("list[Trace]", error.traces), error.failures
        texts = [
            "" if place in failed else returned_text(trace, until)
            for place, (trace, (_, _, until)) in enumerate(zip(traces, settings, strict=True))
        ]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _settings(self, asked: Mapping[str, Any], place: int) -> tuple[Sampling, Limits, tuple[str, ...]]:
        """Sampling, limits and stop texts of one request. Raises OptionError for a setting that is not known."""
        known = {"until", "do_sample", "max_gen_toks", *_SETTINGS}
        if unknown := sorted(asked.keys() - known):
            raise OptionError(
                f"The task asks for {unknown[0]}={asked[unknown[0]]!r}, expected some of {', '.join(sorted(known))}. "
                "Leave it out of --gen_kwargs."
            )
        values = {name: asked[name] for name in _SETTINGS if asked.get(name) is not None}
        if asked.get("do_sample") is False:
            values = {"temperature": 0.0}
        until = asked.get("until") or ()
        return (
            Sampling(**values, seed=question_seed(self._seed, place)),
            Limits(max_tokens=int(asked.get("max_gen_toks") or self._max_tokens)),
            (until,) if isinstance(until, str) else tuple(until),
        )

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Raises NotImplementedError: a reasoning model answers in text."""
        raise NotImplementedError(
            "qwq_mlx gives no log-likelihoods, which this task asks for. Choose a task that generates text "
            "(output_type: generate_until), gsm8k or minerva_math500 say."
        )

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Raises NotImplementedError as `loglikelihood` does."""
        self.loglikelihood(requests)
        return []


def returned_text(trace: Trace, until: Sequence[str]) -> str:
    """What lm-eval scores: the answer's part of the text, up to the first stop text in it; "" where it was cut.

    A text without a part of its own for the answer is returned whole, and stop texts are looked for in all of it.
    """
    if ending_of(trace) in ("cut", "looped"):
        return ""
    text = trace.conclusion or trace.text
    ends = [place for each in until if each and (place := text.find(each)) >= 0]
    return text[: min(ends, default=len(text))]


def _messages(context: str) -> Messages:
    if not context.startswith(_CHAT):
        return context
    messages: list[dict[str, str]] = json.loads(context.removeprefix(_CHAT))
    return messages


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
