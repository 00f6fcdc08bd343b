"""A loaded model fills in what a caller leaves open and makes the request of a run.

Does not: run it (`reasoner` does).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace

from qwq_mlx.engine.detokenizer import Pieces, decode
from qwq_mlx.engine.drafters.speculator import Speculator
from qwq_mlx.engine.logits_processors import LogitsProcessor
from qwq_mlx.engine.row import check_ids
from qwq_mlx.errors import OptionError
from qwq_mlx.facts import QWQ_32B, QWQ_32B_PREVIEW
from qwq_mlx.generate.budget_forcing import cue_ids
from qwq_mlx.generate.checkpoint.resume import raised, with_room
from qwq_mlx.generate.checkpoint.state import RunState
from qwq_mlx.generate.drafting import DraftChoice, make_speculator
from qwq_mlx.generate.receipt import Receipt, make_receipt
from qwq_mlx.generate.request import Request
from qwq_mlx.model.device import backend_name
from qwq_mlx.model.load import LoadedModel
from qwq_mlx.model.memory.fit import Fitted, fitted
from qwq_mlx.model.memory.plan import ModelShape
from qwq_mlx.model.ranks import ranks_of
from qwq_mlx.options import Inspect, Limits, Sampling, Thinking, from_json
from qwq_mlx.reasoning.profile import Profile, find_profile
from qwq_mlx.trace.trace import Trace

__all__ = ["RequestMaker"]


class RequestMaker:
    """A model with its defaults, its profile and the memory there is; `Reasoner` says what the arguments are.

    check_model: called before each pass; raises DamagedModelError where the model's bytes are known to be wrong.

    drafts: guesses ids for all runs; None decodes without (`use_drafts`).
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        profile: Profile | None,
        limit_bytes: int | None,
        check_model: Callable[[], None] | None,
    ) -> None:
        self.model = model
        self.limit_bytes = limit_bytes
        self.pieces = Pieces(model.tokenizer)
        tagged = "<think>" in model.tokenizer.added
        self.profile = profile or find_profile((QWQ_32B if tagged else QWQ_32B_PREVIEW).profile)
        self._check_model = check_model
        self.drafts: Speculator | None = None
        self._draft_choice = DraftChoice()

    def use_drafts(self, choice: DraftChoice, *, limits: Limits) -> None:
        """Draft for all runs from here on; loads the draft model, and measures what passes cost where nobody has.

        choice: checked. limits: of the runs to come.
        """
        self._draft_choice = choice
        self.drafts = make_speculator(self.model, choice, limits=self.fit(limits).limits)

    def request(
        self,
        ids: Sequence[int],
        *,
        question: str,
        system_prompt: str | None,
        sampling: Sampling,
        fit: Fitted,
        thinking: Thinking,
        inspect: Inspect,
        forked_at: int = 0,
        logits_processors: Sequence[LogitsProcessor] = (),
    ) -> Request:
        """The request of a run behind these ids, everything filled in.

        ids: of the whole prompt. question: what people wrote in it. sampling: resolved. fit: with max_tokens filled in.
        Raises OptionError for ids that the tokenizer does not have, or what this model cannot show.
        """
        n_ids, n_layers = self.model.tokenizer.n_ids, self.model.config.num_hidden_layers
        check_ids(ids, n_ids)
        if not all(callable(processor) for processor in logits_processors):
            raise OptionError(f"logits_processors is {logits_processors!r}, expected functions (tokens, logits).")
        inspect.check(n_ids=n_ids, n_layers=n_layers, detects_loops=thinking.on_loop != "off")
        ranks = ranks_of(self.model.module)
        missing = [] if ranks is None else [n for n in inspect.hidden_layers if max(0, n - 1) not in ranks.layers]
        if missing:
            raise OptionError(
                f"hidden_layers has {missing[0]}, which another process of the pipeline computes; this one has layers "
                f"{ranks.layers.start} and on. Ask for layers from {ranks.layers.start + 1}."  # type: ignore[union-attr]
            )
        return Request(
            model=self.model,
            pieces=self.pieces,
            profile=self.profile,
            prompt_ids=tuple(ids),
            question=question,
            system_prompt=system_prompt,
            sampling=sampling,
            limits=fit.limits,
            thinking=thinking,
            inspect=inspect,
            forked_at=forked_at,
            plan=fit.plan,
            note=fit.note,
            logits_processors=tuple(logits_processors),
            check_model=self._check_model,
            drafts=self.drafts,
        )

    def resolved(self, sampling: Sampling) -> Sampling:
        """The sampling with every open value filled from the model's generation_config.json, and a seed."""
        own = self.model.defaults
        filled = sampling.resolve(
            Sampling(
                temperature=own.temperature,
                top_p=own.top_p,
                top_k=own.top_k,
                min_p=own.min_p,
                repetition_penalty=own.repetition_penalty,
            )
        )
        if filled.seed is not None:
            return filled
        return replace(filled, seed=secrets.randbits(32))

    def decode(self, ids: list[int]) -> str:
        """The text of ids, control tokens included."""
        return decode(self.pieces, ids)

    def fit(self, limits: Limits) -> Fitted:
        """These limits as this machine can keep them, and the memory plan. Raises FitError or OptionError."""
        model, ranks = self.model, ranks_of(self.model.module)
        shape = ModelShape(config=model.config, packed=model.packed)
        return fitted(
            shape,
            limits,
            limit_bytes=self.limit_bytes,
            backend=backend_name(),
            compute_type=model.compute_type,
            draft=self._draft_choice.shape,
            drafts_from_texts=self._draft_choice.uses_texts,
            split=None if ranks is None else ranks.split,
            of_ranks=() if ranks is None else ranks.limits,
        )

    def receipt(self, trace: Trace) -> Receipt:
        """What a trace of this model followed from, to keep and to repeat (`python -m qwq_mlx.replay`)."""
        return make_receipt(self.model, trace)

    def request_of(self, receipt: Receipt) -> Request:
        """What a receipt's run asked for. Raises OptionError for what a receipt cannot hold."""
        hooks = "logits processors of its caller"  # logits_hook: their name in earlier versions
        others = {"logits_processors": hooks, "logits_hook": hooks, "forked_at": "a beginning drawn with another seed"}
        for name, words in others.items():
            if receipt.settings.get(name):
                raise OptionError(f"The run had {words}, which its receipt does not hold, so it cannot be repeated.")
        sampling, limits, thinking = from_json(receipt.settings, where="The receipt")
        return self.request(
            receipt.prompt_ids,
            question=receipt.question,
            system_prompt=receipt.settings.get("system_prompt"),
            sampling=sampling,
            fit=self.fit(limits),
            thinking=thinking,
            inspect=Inspect(),
        )

    def request_of_state(
        self,
        state: RunState,
        *,
        max_tokens: int | None = None,
        context: int | None = None,
        answer_now: bool = False,
        inspect: Inspect | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
    ) -> tuple[Request, RunState]:
        """What a run that is gone on with asks for, and its state with room to go on (`checkpoint.resume.with_room`).

        state: opened (`checkpoint.resume.opened`). The other arguments are those of `Reasoner.resume`.
        Raises OptionError where there is no room; FitError.
        """
        sampling, limits, thinking = from_json(state.settings, where="The saved run")
        limits = raised(limits, state, max_tokens=max_tokens, context=context)
        n_cue = len(cue_ids(self.model.tokenizer, self.profile, after="..")) if answer_now else 0
        state = with_room(state, limits, n_cue=n_cue, answer_tokens=thinking.answer_tokens)
        request = self.request(
            state.prompt_ids,
            question=state.question,
            system_prompt=state.settings.get("system_prompt"),
            sampling=sampling,
            fit=self.fit(limits),
            thinking=thinking,
            inspect=inspect or (Inspect() if state.seen is None else state.seen.asked),
            forked_at=state.settings.get("forked_at", 0),
            logits_processors=logits_processors,
        )
        return request, state
