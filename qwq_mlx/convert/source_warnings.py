"""What is odd about a checkpoint that can be converted, and what is made of it.

Does not: refuse anything (`preflight` does), or read weights.
"""

from __future__ import annotations

from qwq_mlx.files.checkpoint import CONFIG_NAME, Checkpoint
from qwq_mlx.model.template import template_warning
from qwq_mlx.model.tensor_types import float_type_warnings
from qwq_mlx.model.tokenizer import read_chat_template

__all__ = ["packing_keys", "source_warnings"]


def source_warnings(checkpoint: Checkpoint, *, chat_template: str | None = None) -> list[str]:
    """Sentences about a checkpoint that `preflight.check_source` accepts; none for one as its publisher wrote it.

    chat_template: that the conversion gets in place of the source's.
    """
    where = checkpoint.folder / CONFIG_NAME
    warnings = [f"{where}: {key} is ignored: every tensor holds plain floats." for key in packing_keys(checkpoint)]
    warnings += float_type_warnings(checkpoint)
    template = chat_template or read_chat_template(checkpoint.folder)
    if about_template := template_warning(template):
        warnings.append(about_template)
    if template is None:
        warnings.append(
            f"{checkpoint.where}: has no chat template, so the conversion will not answer questions. Give one "
            "as `chat_template`: chat_template.jinja of the model's source, or of a model of the same family."
        )
    return [*checkpoint.warnings, *warnings]


def packing_keys(checkpoint: Checkpoint) -> list[str]:
    """The entries of config.json that say how weights are packed; null and an empty object say nothing."""
    return [key for key in ("quantization", "quantization_config") if checkpoint.config.get(key)]
