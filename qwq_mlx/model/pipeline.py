"""One stage of a pipeline: a rank's consecutive layers of mlx_lm's Qwen2, between what it receives and what it sends.

mlx_lm splits the layers the same way, but ends each pass with an all_gather that gives every rank the result. Here
rank 0, which has the last layers, keeps it: the other ranks have nothing to do with logits.

Does not: say how many layers a rank has (`split` does), or feed the ranks the same ids.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

from qwq_mlx.model.kernels.layers import run_layers
from qwq_mlx.model.split import Split
from qwq_mlx.model.upstream import import_mlx_lm

__all__ = ["make_stage"]


def make_stage(module: Any, split: Split, group: Any) -> None:
    """Leave in a module the layers of this rank, between its neighbours of a group."""
    module.model.__class__ = _stage_class()
    module.model.pipeline(group, split=list(split.n_layers))
    module.model.group = group
    module.model.received = None


@functools.cache
def _stage_class() -> type[Any]:
    home, base = import_mlx_lm("mlx_lm.models.qwen2"), import_mlx_lm("mlx_lm.models.base")

    class Stage(home.Qwen2Model):  # type: ignore[misc, name-defined]
        """group: of all stages. received: of the last pass, None in the first stage."""

        def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: Any = None) -> mx.array:
            """Hidden states behind the last norm on rank 0, (rows, ids, hidden); elsewhere what was sent.

            inputs: (rows, ids), the same on every rank.
            """
            cache = cache or [None] * len(self.pipeline_layers)
            h = self._before(inputs, input_embeddings)
            mask = base.create_attention_mask(h, cache[0])
            h = run_layers(self.pipeline_layers, h, mask, cache)
            if self.pipeline_rank:
                return mx.distributed.send(h, self.pipeline_rank - 1, group=self.group)
            result: mx.array = self.norm(h)
            return result

        def _before(self, inputs: mx.array, input_embeddings: Any) -> mx.array:
            """What the first of this rank's layers takes."""
            if self.pipeline_rank == self.pipeline_size - 1:
                first: mx.array = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
                return first
            # Messages have no names, so their order is all that says which is which, and nothing else orders those of
            # two passes that are evaluated at once. Ids that rank 0 drew are a message, too, which nothing here reads.
            mx.async_eval(inputs)  # type: ignore[no-untyped-call]
            if self.received is not None:
                mx.async_eval(self.received)  # type: ignore[no-untyped-call]
            shape = (*inputs.shape, self.args.hidden_size)
            dtype = self.pipeline_layers[0].input_layernorm.weight.dtype
            received = mx.distributed.recv(shape, dtype, self.pipeline_rank + 1, group=self.group)
            object.__setattr__(self, "received", received)  # not a parameter
            return received

    return Stage
