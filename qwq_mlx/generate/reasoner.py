"""A loaded model that answers questions: `load(folder)` gives a `Reasoner`, `.generate(question)` a `Trace`.

What a caller leaves open is filled here, once: sampling from the model's generation_config.json, a seed drawn and
written down, `max_tokens` as the room that the context leaves. Then `stream.Stream` takes over.

Does not: keep a conversation's cache, or print.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwq_mlx.engine.kv_cache import take_layers
from qwq_mlx.engine.logits_processors import LogitsProcessor
from qwq_mlx.engine.ranks.whole_cache import cache_of_whole
from qwq_mlx.errors import OptionError
from qwq_mlx.files.background_verification import BackgroundVerification
from qwq_mlx.generate.batch import check_width, finish_all, plan_rows, settings_of_each
from qwq_mlx.generate.checkpoint.resume import read_saved, within
from qwq_mlx.generate.load_plan import load_planned, plan_load
from qwq_mlx.generate.receipt import Receipt
from qwq_mlx.generate.request import PrefillProgress, resolved
from qwq_mlx.generate.request_maker import RequestMaker
from qwq_mlx.generate.stream import Stream
from qwq_mlx.generate.vote import Vote, VoteProgress, Voting
from qwq_mlx.model.load import ComputeType, LoadedModel, LoadProgress
from qwq_mlx.model.prompt import Messages, conversation, prompt_ids
from qwq_mlx.model.split import SplitKind
from qwq_mlx.options import Inspect, Limits, Sampling, Thinking
from qwq_mlx.reasoning.profile import Profile
from qwq_mlx.trace.trace import Trace

__all__ = ["Reasoner", "load"]


def load(
    folder: str | Path | None = None,
    *,
    compute_type: ComputeType | None = None,
    limits: Limits | None = None,
    force: bool = False,
    verify: bool = True,
    chat_template: str | Path | None = None,
    follow_links: bool = False,
    reproducible: bool = False,
    draft: str | Path | None = None,
    draft_length: int | None = None,
    group: Any | None = None,
    split: SplitKind | None = None,
    progress: LoadProgress | None = None,
) -> Reasoner:
    """Check a model folder (a checkpoint or a conversion), load its weights, and return what answers questions.

    folder: None takes the default model as the commands do: $QWQ_MLX_MODEL, the first conversion of a QwQ-32B under
      conversions/, else the bundled pocket model, converted once into the user's cache.
    compute_type: "float32" or "bfloat16"; None picks by backend.
    limits: of the runs to come, so that what cannot fit the memory is refused before a weight is read.
    force: plan, but refuse and cap nothing.
    verify: compare a conversion with its manifest in the background; see `Reasoner.wait_for_verification`.
    chat_template: a file of jinja text that writes the prompts in place of the folder's template.
    follow_links: read shards that links out of the folder lead to, on another disk say.
    reproducible: a row draws the very ids that it draws alone; at most 7 rows share a pass on the CPU, 32 on CUDA.
    draft: who guesses ids that a pass then checks, which changes no id: "ngram", the texts so far; the folder of a
      small model of the same tokenizer; "auto", that of $QWQ_MLX_DRAFT or else "ngram". None: nobody.
    draft_length: ids to guess, whatever they cost; None as many as are measured to pay, often none.
    group: from `mx.distributed.init`: its processes hold the model together. Rank 0 calls this, the others `follow`.
      A group of one process is as none.
    split: "tensor", a part of every layer each, or "pipeline", layers by its memory; None by the context they reach.
    progress: called while the weights are read, with the layers that are in memory and their number.
    Raises LoadError, SourceError or BackendError; OptionError for options that do not go together; FitError with the
    arithmetic; RankError where another process of the group is gone.

    >>> reasoner = qwq_mlx.load(FOLDER, limits=qwq_mlx.Limits(context=2048))
    >>> reasoner.generate("What is 3 + 4?", sampling=qwq_mlx.Sampling(temperature=0)).answer
    '7'
    """
    asked = limits or Limits()
    plan = plan_load(
        folder,
        asked,
        compute_type=compute_type,
        force=force,
        follow_links=follow_links,
        reproducible=reproducible,
        draft=draft,
        draft_length=draft_length,
        group=group,
        split=split,
    )
    model = load_planned(
        plan,
        compute_type=compute_type,
        chat_template=chat_template,
        follow_links=follow_links,
        reproducible=reproducible,
        verify=verify,
        progress=progress,
    )
    reasoner = Reasoner(model, limit_bytes=plan.limits[0], verify=verify)
    reasoner.use_drafts(plan.drafts, limits=asked)
    return reasoner


class Reasoner(RequestMaker):
    """One model, ready for any number of questions, each on its own.

    model: what `load` loads.
    profile: how it separates thinking from answer; None takes the tagged one where the tokenizer has `<think>`.
    limit_bytes: what the device gave before the weights came; a run that does not fit is refused. None refuses nothing.
    verify: compare the bytes of a folder that has a manifest with it, in a thread; a run then ends with a
      DamagedModelError as soon as a difference is known.

    >>> reasoner.profile.name
    'qwq-preview'
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        profile: Profile | None = None,
        limit_bytes: int | None = None,
        verify: bool = False,
    ) -> None:
        self._verification: BackgroundVerification | None = None
        if verify and model.has_manifest:
            self._verification = BackgroundVerification(model.folder)
            self._verification.start()
            weakref.finalize(self, self._verification.stop)  # also at the interpreter's end
        super().__init__(
            model,
            profile=profile,
            limit_bytes=limit_bytes,
            check_model=None if self._verification is None else self._verification.check,
        )

    def wait_for_verification(self, *, timeout_s: float = 10.0) -> str:
        """Wait until the bytes of the conversion are compared with its manifest.

        Call it before an answer is relied on: a short one may be complete before the comparison is.
        Returns "" where every byte is right, or nothing is compared (no manifest, or `verify` was False); else a
        sentence that says how far the comparison is. Raises DamagedModelError naming file, tensor and both digests.

        >>> reasoner.wait_for_verification()
        ''
        """
        return "" if self._verification is None else self._verification.wait(timeout_s=timeout_s)

    def close(self) -> None:
        """End the comparison with the manifest. The model can still be used."""
        if self._verification is not None:
            self._verification.stop()

    def generate(
        self,
        messages: Messages,
        *,
        system_prompt: str | None = None,
        sampling: Sampling | None = None,
        limits: Limits | None = None,
        thinking: Thinking | None = None,
        inspect: Inspect | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        progress: PrefillProgress | None = None,
        ask_answer: bool = False,
    ) -> Trace:
        """Answer a question, or continue messages of {"role", "content"}, to the end.

        system_prompt: put first; None leaves what the chat template writes.
        sampling: None leaves every value to the model.
        limits: None leaves every value to the model.
        thinking: its budget; None is none.
        inspect: what every Step shows besides; None is nothing.
        logits_processors: functions (tokens, logits) -> logits as in mlx-lm, called before all others, in their order.
          tokens is uint32 (n,), prompt and output so far; logits is float32 (1, n_ids), and so is what they return.
        progress: called in prefill with the ids done and their number.
        ask_answer: ask the model behind its text where that gives no sure answer (`Stream.ask_answer`).
        Raises PromptError or OptionError before any work; GenerationError, whose `.trace` has what was produced.

        >>> trace = reasoner.generate("What is 3 + 4?", sampling=qwq_mlx.Sampling(temperature=0))
        >>> trace.answer
        '7'
        """
        run = self.stream(
            messages,
            system_prompt=system_prompt,
            sampling=sampling,
            limits=limits,
            thinking=thinking,
            inspect=inspect,
            logits_processors=logits_processors,
            progress=progress,
        )
        for _ in run:
            pass
        if ask_answer:
            run.ask_answer()
        return run.trace()

    def stream(
        self,
        messages: Messages,
        *,
        system_prompt: str | None = None,
        sampling: Sampling | None = None,
        limits: Limits | None = None,
        thinking: Thinking | None = None,
        inspect: Inspect | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        progress: PrefillProgress | None = None,
        before: Stream | None = None,
    ) -> Stream:
        """As `generate`, one Step at a time: `for step in run: ...`, then `run.trace()`.

        before: the run of the turn before; its KV cache is taken over as far as the ids agree, so that run is over
          then.
        The other arguments are those of `generate`.

        >>> run = reasoner.stream("What is 3 + 4?", sampling=qwq_mlx.Sampling(temperature=0))
        >>> "".join(step.text for step in run) == run.trace().text
        True
        """
        fit = self.fit(limits or Limits())
        checked = conversation(messages, system_prompt=system_prompt)
        ids = prompt_ids(self.model.tokenizer, checked, context=resolved(fit.limits.context))
        request = self.request(
            ids,
            question=" ".join(message["content"] for message in checked[system_prompt is not None :]),
            system_prompt=system_prompt,
            sampling=self.resolved(sampling or Sampling()),
            fit=replace(fit, limits=within(fit.limits, len(ids))),
            thinking=thinking or Thinking(),
            inspect=inspect or Inspect(),
            logits_processors=logits_processors,
        )
        return Stream(request, progress=progress, before=before)

    def batch_generate(
        self,
        questions: Sequence[Messages],
        *,
        system_prompt: str | None = None,
        sampling: Sampling | Sequence[Sampling] | None = None,
        limits: Limits | Sequence[Limits] | None = None,
        thinking: Thinking | Sequence[Thinking] | None = None,
        inspect: Inspect | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        width: int | None = None,
        ask_answer: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Trace]:
        """The traces of many questions in their order, decoded side by side; a row's ids are those it has alone.

        questions: texts, or lists of messages.
        sampling, limits, thinking: one for all (a seed is then made into one of each place), or one each.
        width: rows side by side; None takes as many as the plan of their memory allows, at most 8.
        progress: called with the questions that have ended and the tokens of all, after each step; None shows a bar
          with tokens a second and what remains, on stderr where that is a terminal.
        The other arguments are those of `generate`; logits processors are shared, so they may hold no state of a row.
        Raises PromptError, OptionError or FitError before any work; BatchError at the end where a question failed.

        >>> greedy = qwq_mlx.Sampling(temperature=0)
        >>> [trace.answer for trace in reasoner.batch_generate(["What is 3 + 4?", "What is 2 + 9?"], sampling=greedy)]
        ['7', '11']
        """
        check_width(width)
        settings = settings_of_each(len(questions), sampling, limits, thinking)
        streams = [
            self.stream(
                question,
                system_prompt=system_prompt,
                sampling=own_sampling,
                limits=own_limits,
                thinking=own_thinking,
                inspect=inspect,
                logits_processors=logits_processors,
            )
            for question, (own_sampling, own_limits, own_thinking) in zip(questions, settings, strict=True)
        ]
        if not streams:
            return []
        plan = plan_rows([stream.request for stream in streams], width, limit_bytes=self.limit_bytes)
        return finish_all(streams, plan=plan, ask_answer=ask_answer, progress=progress)

    def vote(
        self,
        question: Messages | Stream,
        n: int = 8,
        *,
        at: int | None = None,
        system_prompt: str | None = None,
        sampling: Sampling | None = None,
        limits: Limits | None = None,
        thinking: Thinking | None = None,
        width: int | None = None,
        ask_answer: bool = True,
        stop_early: bool = True,
        confidence: float | None = None,
        progress: VoteProgress | None = None,
    ) -> Vote:
        """The answer that most of n samples agree on; one prefill, and sample i has a seed made of the seed and i.

        question: a text or messages; or a run (`stream`), whose settings hold and whose first `at` output tokens all
          samples share.
        at: output tokens of that run; None takes all there are, 0 its prompt alone.
        width: samples side by side; None takes as many as the memory plan allows, at most 8. What they share is held
          once, from 256 positions on.
        ask_answer: ask a sample whose text gives no sure answer (`Stream.ask_answer`).
        stop_early: end as soon as the samples under way or to come cannot overtake or equal the first answer.
        confidence: end also where the first answer is more frequent than the second with this probability, 0.95 say
          (`vote.posterior`). It takes the samples that ended first, which are the short ones, for drawn at random.
        progress: called after each sample that ended.
        A sample that fails ends alone (`Vote.failures`). Raises PromptError, OptionError or FitError before any work;
        BatchError where all fail.

        >>> vote = reasoner.vote("What is 3 + 4?", n=3, width=2, sampling=qwq_mlx.Sampling(seed=1))
        >>> vote.answer, vote.agreement, vote.stopped
        ('7', 1.0, 'lead')
        """
        if isinstance(question, Stream):
            if any(each is not None for each in (system_prompt, sampling, limits, thinking)):
                raise OptionError("A vote from a run has its settings. Leave out system_prompt, sampling, ...")
            run, at = question, len(question.run.steps) if at is None else at
        elif at is not None:
            raise OptionError("`at` is a place in the output of a run. Give a run (`stream`), or leave it out.")
        else:
            run = self.stream(
                question, system_prompt=system_prompt, sampling=sampling, limits=limits, thinking=thinking
            )
        return Voting(
            run,
            n,
            at=at or 0,
            width=width,
            ask_answer=ask_answer,
            stop_early=stop_early,
            confidence=confidence,
            limit_bytes=self.limit_bytes,
        ).work(progress)

    def rerun(self, receipt: Receipt) -> Stream:
        """The run of a receipt once more, from its prompt's ids and settings; the model is the caller's to compare.

        Raises OptionError for what a receipt cannot hold (logits processors, a fork), or ids beyond the vocabulary.
        """
        return Stream(self.request_of(receipt))

    def resume(
        self,
        path: str | Path,
        *,
        max_tokens: int | None = None,
        context: int | None = None,
        answer_now: bool = False,
        inspect: Inspect | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
    ) -> Stream:
        """Go on with a run that `Stream.save` wrote, as if it had never stopped; its settings are the file's.

        path: of the saved run.
        max_tokens: of the whole output, to go on after "length".
        context: to go on after "context_full".
        answer_now: ask for the answer where the run stands, also where the model had ended its text ("stop"), it was a
          loop, or the context is full: its last tokens then make room.
        inspect: of the Steps from here on; None shows what the saved run showed. What it saw is in the file.
        logits_processors: the caller's own, which no file can hold and which have to be given again.
        Raises SourceError for a file that is damaged, of another model or compute type, or of a run that has ended;
        OptionError for max_tokens or a context below what there is, for answer_now where the answer has begun or has no
        room, or logits processors that are missing; FitError.

        >>> greedy, question = qwq_mlx.Sampling(temperature=0), "What is 3 + 4?"
        >>> run = reasoner.stream(question, sampling=greedy)
        >>> first = [next(run).id for _ in range(5)]
        >>> run.save("run.qwq")
        >>> rest = [step.id for step in reasoner.resume("run.qwq")]
        >>> (*first, *rest) == reasoner.generate(question, sampling=greedy).ids
        True
        """
        has_processors = bool(logits_processors)
        state, arrays = read_saved(Path(path), self.model, has_processors=has_processors, answer_now=answer_now)
        request, state = self.request_of_state(
            state,
            max_tokens=max_tokens,
            context=context,
            answer_now=answer_now,
            inspect=inspect,
            logits_processors=logits_processors,
        )
        run = Stream(request)
        cache = cache_of_whole(self.model, take_layers(arrays, state.capacities), request.plan.workload.kv_bits)
        run.restore(state, cache, arrays, answer_now=answer_now)
        return run
