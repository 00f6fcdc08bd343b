"""Steps that make a drafter name what the target wrote: cross-entropy on the target's ids, by Adam.

mlx-lm's LoRA layers carry what is learnt, on every linear layer, or all weights do. What is trained is held in float32
and cast for each step, because a step of 2e-5 is lost in bfloat16. Layers are recomputed in the backward pass, and
logits are made `CHUNK` places at a time, so memory is bounded by the ids of a batch.

mlx-lm's own training loop is not used: it keeps neither the optimizer's state nor its place, so it cannot be gone on
with, and it trains on all ids of a long text or none.

Does not: choose batches, or write files.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from qwq_mlx.errors import NotFiniteError
from qwq_mlx.model.load import LoadedModel, build_module, packing_arguments
from qwq_mlx.model.upstream import import_mlx_lm
from qwq_mlx.tune_draft.settings import TuneSettings
from qwq_mlx.tune_draft.tokens_a_pass import CHUNK, head, hidden_states
from qwq_mlx.tune_draft.windows import Batch

__all__ = ["Trainer"]

_SCALE = 2.0  # of what the LoRA layers add: twice, whatever their rank
_WARM_UP = 0.05  # of all steps
_LARGEST_GRADIENT = 1.0  # norm of all together


class Trainer:
    """A drafter in training.

    model: the drafter; packed matrices become floats. n_steps: that will be taken. n_taken: that were.
    """

    def __init__(self, model: LoadedModel, settings: TuneSettings, *, n_steps: int) -> None:
        self.n_steps, self.n_taken = n_steps, 0
        self._settings = settings
        self._dtype = getattr(mx, model.compute_type)
        self._module = build_module(model.config, {})
        self._module.update(tree_unflatten(list(_floats(model).items())))
        if not settings.all_weights:
            _add_lora(self._module, settings)
        self._trained = tree_map(lambda array: array.astype(mx.float32), self._module.trainable_parameters())
        self._optimizer = optim.Adam(settings.highest_rate, bias_correction=True)
        self._optimizer.init(self._trained)

    def step(self, batch: Batch) -> float:
        """Learn a batch; returns the loss before, in nats a token. Raises NotFiniteError."""
        arrays = mx.array(batch.ids), mx.array(batch.places), mx.array(batch.targets)
        loss, gradient = mx.value_and_grad(self._loss)(self._trained, *arrays)
        gradient, norm = optim.clip_grad_norm(gradient, _LARGEST_GRADIENT)
        self._optimizer.learning_rate = mx.array(self._settings.highest_rate * self._share_of_rate())
        self._trained = self._optimizer.apply_gradients(gradient, self._trained)
        del gradient
        mx.eval(loss, norm, self._trained, self._optimizer.state)
        self.n_taken += 1
        value, size = float(loss.item()), float(norm.item())
        if not (math.isfinite(value) and math.isfinite(size)):
            raise NotFiniteError(
                f"Step {self.n_taken:,} of training: the loss is {value}, the gradient's norm {size}. Take a smaller "
                "`learning_rate`; if it is so at the first step, check the drafter's weights (python -m qwq_mlx.verify "
                "FOLDER)."
            )
        return value

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on, by name."""
        return dict(tree_flatten({"trained": self._trained, "optimizer": self._optimizer.state}))

    def load_state(self, arrays: Mapping[str, Any], n_taken: int) -> None:
        """Go on behind a step, with what `state` gave there."""
        # in the order of the own state, by which the norm of the gradients is summed
        tree: Any = tree_unflatten([(name, arrays[name]) for name in self.state()])
        self._trained, self._optimizer.state, self.n_taken = tree["trained"], tree["optimizer"], n_taken

    def weights(self) -> dict[str, Any]:
        """The drafter as it is now: its tensors by name, LoRA layers added to what they belong to, in bfloat16."""
        self._module.update(self._trained)
        flat = dict(tree_flatten(self._module.parameters()))
        lora = [path for path, layer in self._module.named_modules() if "lora_a" in layer]
        for path in lora:
            a, b, weight = (flat.pop(f"{path}.{name}") for name in ("lora_a", "lora_b", "linear.weight"))
            flat[f"{path}.weight"] = weight.astype(mx.float32) + _SCALE * (a @ b).T
            if (bias := flat.pop(f"{path}.linear.bias", None)) is not None:
                flat[f"{path}.bias"] = bias
        return {name: array.astype(mx.bfloat16) for name, array in flat.items()}

    def _share_of_rate(self) -> float:
        """Of the highest learning rate: a short way up, a straight line down."""
        n_up = max(1, round(_WARM_UP * self.n_steps))
        return min((self.n_taken + 1) / n_up, (self.n_steps - self.n_taken) / max(1, self.n_steps - n_up + 1), 1.0)

    def _loss(self, trained: Any, ids: Any, places: Any, targets: Any) -> Any:
        self._module.update(tree_map(lambda array: array.astype(self._dtype), trained))
        hidden = hidden_states(self._module, ids, recomputed).reshape(-1, self._module.args.hidden_size)
        output = self._module.model.embed_tokens if self._module.args.tie_word_embeddings else self._module.lm_head
        total = mx.array(0.0)
        for first in range(0, places.size, CHUNK):
            loss_of = functools.partial(self._summed_loss, targets=targets[first : first + CHUNK])
            total = total + recomputed(output, loss_of)(hidden[places[first : first + CHUNK]])
        return total / places.size

    def _summed_loss(self, hidden: Any, targets: Any) -> Any:
        logits = head(self._module, hidden).astype(mx.float32)
        return nn.losses.cross_entropy(logits, targets, reduction="sum")


def recomputed(module: nn.Module, run: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """`run`, which uses a module, holding nothing between the passes: it is computed again in the backward pass.

    As nn.utils.checkpoint; but that leaves MLX the order, which takes all modules' gradients of what entered them
    first, and holds what each of them computed until the gradients of its weights are asked for. Here those come first.
    """
    names = [name for name, _ in tree_flatten(module.trainable_parameters())]

    def of_arrays(hidden: mx.array, *weights: mx.array) -> mx.array:
        module.update(tree_unflatten(list(zip(names, weights, strict=True))))
        return run(hidden)

    function: Any = mx.custom_function(of_arrays)

    def gradients(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
        hidden, *weights = [primals] if isinstance(primals, mx.array) else primals  # one alone comes as it is
        _, (of_hidden, *of_weights) = mx.vjp(of_arrays, [mx.depends(hidden, cotangent), *weights], [cotangent])
        return (mx.depends(of_hidden, of_weights), *of_weights) if of_weights else of_hidden

    function.vjp(gradients)
    return lambda hidden: function(hidden, *(array for _, array in tree_flatten(module.trainable_parameters())))


def _floats(model: LoadedModel) -> dict[str, Any]:
    """The tensors of a model by name, in its compute type."""
    flat = dict(tree_flatten(model.module.parameters()))
    for path, packing in model.packed.items():
        arrays = [flat.pop(f"{path}.{name}", None) for name in ("weight", "scales", "biases")]
        flat[f"{path}.weight"] = mx.dequantize(*arrays, **packing_arguments(packing)).astype(
            getattr(mx, model.compute_type)
        )
    return flat


def _add_lora(module: Any, settings: TuneSettings) -> None:
    """mlx-lm's LoRA layers around every linear layer, the only ones that are trained; at first they add nothing."""
    module.freeze()
    import_mlx_lm("mlx_lm.tuner.utils").linear_to_lora_layers(
        module, len(module.layers), {"rank": settings.rank, "scale": _SCALE, "dropout": 0.0}
    )
    layers = [layer for _, layer in sorted(module.named_modules()) if "lora_a" in layer]
    for layer, key in zip(layers, mx.random.split(mx.random.key(settings.seed), len(layers)), strict=True):
        bound = 1 / math.sqrt(layer.lora_a.shape[0])
        layer.lora_a = mx.random.uniform(low=-bound, high=bound, shape=layer.lora_a.shape, key=key)
