"""The models of one table: named, and checked from their headers and tokenizers before a weight of any is loaded.

Does not: load weights (`generate.reasoner` does).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwq_mlx.default_model import Choice
from qwq_mlx.errors import OptionError
from qwq_mlx.evaluate.task import Problem
from qwq_mlx.generate.checkpoint.file import model_digest
from qwq_mlx.model.architecture import tensor_shapes
from qwq_mlx.model.folder import open_model_folder
from qwq_mlx.model.prompt import prompt_ids
from qwq_mlx.model.tokenizer import LoadedTokenizer, check_same_tokenizer, load_tokenizer

__all__ = ["CheckedModel", "check_models", "chosen_labels"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedModel:
    """A model of the table.

    label: its name in the table and of its files; the folder's, with that of the folder above where two have one name.
    choice: where it lies, and what it must be converted from first.
    sha256: of what makes the model, as in receipts and files of results.
    weights: in words.
    size_bytes: of its tensors.
    bits_per_weight: scales included.
    context: positions it was made for.
    """

    label: str
    choice: Choice
    sha256: str
    weights: str
    size_bytes: int
    bits_per_weight: float
    context: int


def chosen_labels(folders: Sequence[Path]) -> list[str]:
    """A label for each folder, unlike all others. Raises OptionError where a folder is named twice.

    >>> chosen_labels([Path("/a/4bit"), Path("/a/3bit"), Path("/b/4bit")])
    ['a-4bit', '3bit', 'b-4bit']
    """
    resolved = [folder.resolve() for folder in folders]
    for place, folder in enumerate(resolved):
        if folder in resolved[:place]:
            raise OptionError(f"model names {folder} twice, expected each model once.")
    names = [folder.name or "model" for folder in resolved]
    parents = [f"{folder.parent.name}-{folder.name}" for folder in resolved]
    labels = [parent if names.count(name) > 1 else name for name, parent in zip(names, parents, strict=True)]
    return [f"{label}-{place}" if labels.count(label) > 1 else label for place, label in enumerate(labels)]


def check_models(
    choices: Sequence[Choice], problem: Problem, *, chat_template: str | None, follow_links: bool
) -> list[CheckedModel]:
    """Check every model, and that all read and write text with one tokenizer.

    choices: at least one, each ready to be opened.
    problem: one of the task, to try each chat template.
    chat_template: jinja text in place of the models' own.
    Raises LoadError or SourceError for a folder that is missing or damaged; OptionError for two tokenizers in one
    table; PromptError where the chat template is missing or fails.
    """
    checked, first = [], None
    for label, choice in zip(chosen_labels([each.folder for each in choices]), choices, strict=True):
        files = open_model_folder(choice.folder, follow_links=follow_links)
        tokenizer = load_tokenizer(files.path, vocab_size=files.config.vocab_size)
        first = first or (files.path, tokenizer)
        check_same_tokenizer(*first, files.path, tokenizer)
        _try_template(tokenizer, chat_template, problem, files.config.max_position_embeddings)
        n_weights = sum(math.prod(shape) for shape in tensor_shapes(files.config).values())
        checked.append(
            CheckedModel(
                label=label,
                choice=choice,
                sha256=model_digest(files.path),
                weights=files.weights,
                size_bytes=files.checkpoint.tensor_bytes,
                bits_per_weight=8 * files.checkpoint.tensor_bytes / n_weights,
                context=files.config.max_position_embeddings,
            )
        )
    return checked


def _try_template(tokenizer: LoadedTokenizer, chat_template: str | None, problem: Problem, context: int) -> None:
    written = tokenizer if chat_template is None else replace(tokenizer, chat_template=chat_template)
    prompt_ids(written, problem.question, context=max(context, 1 << 20))
