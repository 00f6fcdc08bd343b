"""An `Ask` becomes requests that can run, and whatever makes it impossible becomes an `ApiError` with the arithmetic.

It runs beside the model's thread, because a long prompt takes long to encode.

Does not: touch an array, or wait for a row.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

from qwq_mlx.errors import FitError, OptionError, PromptError
from qwq_mlx.files.manifest import MANIFEST_NAME
from qwq_mlx.generate.batch import question_seed
from qwq_mlx.generate.checkpoint.resume import within
from qwq_mlx.generate.reasoner import Reasoner
from qwq_mlx.generate.request import Request, resolved
from qwq_mlx.model.architecture import tensor_shapes
from qwq_mlx.model.memory.fit import Fitted
from qwq_mlx.model.prompt import conversation, encode_prompt, encode_text
from qwq_mlx.options import Inspect, Limits
from qwq_mlx.serve.api_error import ApiError
from qwq_mlx.serve.jobs import Ask
from qwq_mlx.serve.model_card import ModelCard
from qwq_mlx.serve.settings import Settings

__all__ = ["Preparer", "model_card"]


class Preparer:
    """Makes requests for one model, `reasoner`'s. context: positions that a request may use, as planned."""

    def __init__(self, reasoner: Reasoner, settings: Settings) -> None:
        self.reasoner = reasoner
        self._settings = settings
        self._fit = reasoner.fit(Limits(context=settings.context, prefill_step=settings.prefill_step))
        self.context = resolved(self._fit.limits.context)
        self.plan = self._fit.plan

    def requests(self, ask: Ask) -> list[Request]:
        """One request for each prompt. Raises ApiError."""
        try:
            fit = self._fit if ask.context is None else self._fit_of(ask.context)
            if ask.is_raw:
                prompts = [(self._raw_ids(prompt), prompt) for prompt in ask.prompts]
                return [self._request(ask, ids, str(text), fit, place) for place, (ids, text) in enumerate(prompts)]
            checked = conversation(ask.messages)
            ids = encode_prompt(self.reasoner.model.tokenizer, checked, context=resolved(fit.limits.context))
            return [self._request(ask, ids, " ".join(message["content"] for message in checked), fit, 0)]
        except PromptError as error:
            is_long = "must hold at least one more" in str(error)
            code = "context_length_exceeded" if is_long else None
            raise ApiError(400, str(error), param="messages", code=code) from error
        except OptionError as error:
            param = str(error).partition(" ")[0]  # of the options; ids have none
            raise ApiError(400, str(error), param="prompt" if param == "Place" else param) from error

    def n_tokens(self, messages: tuple[dict[str, str], ...]) -> int:
        """Ids of the prompt that messages make. Raises ApiError."""
        return len(self.requests(Ask(messages=messages))[0].prompt_ids)

    def _raw_ids(self, prompt: str | tuple[int, ...]) -> list[int]:
        if isinstance(prompt, str) and any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ApiError(400, "prompt holds a lone surrogate, which is no text, expected UTF-8.", param="prompt")
        ids = encode_text(self.reasoner.model.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise ApiError(400, "prompt is empty, expected at least one token.", param="prompt")
        return ids

    def _fit_of(self, context: int) -> Fitted:
        """The plan of a context that the client names. Raises ApiError where it is larger than the server's."""
        limits = replace(self._fit.limits, context=context, max_tokens=None)
        if context > self.context:
            raise ApiError(
                400,
                f"A context of {context:,} is asked for; this server has {self.context:,} positions. Of that the plan "
                f"says:\n{self._fit.plan.arithmetic()}",
                param="num_ctx",
                code="context_length_exceeded",
            )
        try:
            return self.reasoner.fit(limits)
        except FitError as error:
            raise ApiError(400, str(error), param="num_ctx", code="context_length_exceeded") from error

    def _request(self, ask: Ask, ids: list[int], text: str, fit: Fitted, place: int) -> Request:
        context = resolved(fit.limits.context)
        n_asked = len(ids) + (ask.max_tokens or 1)
        if n_asked > context:
            raise ApiError(
                400,
                f"The prompt is {len(ids):,} tokens and at most {ask.max_tokens or 1:,} are to be written, together "
                f"{n_asked:,}; the context is {context:,} positions. Of that the plan says:\n{fit.plan.arithmetic()}\n"
                "Shorten the prompt, or ask for fewer tokens.",
                param="max_tokens" if len(ids) < context else "messages",
                code="context_length_exceeded",
            )
        n_ids, biased = self.reasoner.model.tokenizer.n_ids, max(ask.sampling.logit_bias, default=0)
        if biased >= n_ids:
            raise ApiError(400, f"logit_bias names id {biased:,}, expected below {n_ids:,}.", param="logit_bias")
        sampling = self.reasoner.resolved(ask.sampling)
        if place:
            sampling = replace(sampling, seed=question_seed(resolved(sampling.seed), place))
        stop = ask.stop if ask.is_raw else ()
        limits = within(replace(fit.limits, max_tokens=ask.max_tokens, stop=stop), len(ids))
        return self.reasoner.request(
            ids,
            question=text,
            system_prompt=None,
            sampling=sampling,
            fit=replace(fit, limits=limits),
            thinking=ask.thinking,
            inspect=Inspect(
                top_k=ask.top_logprobs or 0,
                entropy=ask.shows_steps,
                loop_scores=ask.shows_steps and ask.thinking.on_loop != "off",
            ),
        )


def model_card(reasoner: Reasoner, settings: Settings, context: int) -> ModelCard:
    """What clients may know of this model. context: positions of one request."""
    model, config = reasoner.model, reasoner.model.config
    manifest = model.folder / MANIFEST_NAME
    files = sorted((path.name, path.stat().st_size) for path in model.folder.iterdir() if path.is_file())
    digest = hashlib.sha256(repr(files).encode()).hexdigest()
    return ModelCard(
        name=settings.name or model.name,
        weights=model.weights,
        weights_bytes=model.weights_bytes,
        n_parameters=sum(math.prod(shape) for shape in tensor_shapes(config).values()),
        digest=digest,
        identity=hashlib.sha256(manifest.read_bytes()).hexdigest() if model.has_manifest else digest,
        modified_s=model.folder.stat().st_mtime,
        template=model.tokenizer.chat_template or "",
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context=context,
        width=settings.width,
        has_tags=reasoner.profile.has_tags,
    )
