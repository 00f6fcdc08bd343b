"""The models of one table: named, and checked from their headers and tokenizers before a weight of any is loaded.

Does not: load weights (`generate.reasoner` does).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwq_mlx.default_model import Choice
from qwq_mlx.errors import OptionError, PromptError
from qwq_mlx.generate.checkpoint.file import model_digest
from qwq_mlx.model.architecture import tensor_shapes
from qwq_mlx.model.folder import ModelFolder, open_model_folder
from qwq_mlx.model.generation_config import read_generation_defaults
from qwq_mlx.model.prompt import prompt_ids
from qwq_mlx.model.tokenizer import check_same_tokenizer, load_tokenizer

__all__ = ["CheckedModel", "check_models", "chosen_labels"]

_MAX_PROMPT = 1 << 24  # no prompt is refused here; one that a model has no room for fails by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedModel:
    """A model of the table.

    label: its name in the table and of its files (`chosen_labels`).
    choice: where it lies, and what it must be converted from first.
    sha256: of what makes the model, as in receipts and files of results.
    weights: in words.
    size_bytes: of its tensors.
    bits_per_weight: scales included.
    context: positions it was made for.
    names_sampling: its generation_config.json says at which temperature to draw.
    n_prompt: tokens of the prompt that one problem makes, which bounds what its chat template adds to any.
    """

    label: str
    choice: Choice
    sha256: str
    weights: str
    size_bytes: int
    bits_per_weight: float
    context: int
    names_sampling: bool
    n_prompt: int


def chosen_labels(names: Sequence[str | Path]) -> list[str]:
    """A label for each model, unlike all others: the end of its name, with the folder above where two are alike.

    names: folders, repositories or GGUF files, as the user named them. Labels name files, so two that differ only in
    case are alike, as on a Mac's disk.

    >>> chosen_labels(["/a/4bit", "/a/3bit/", "/b/4bit", "Qwen/QwQ-32B-Preview", "ollama:qwq:32b"])
    ['a-4bit', '3bit', 'b-4bit', 'QwQ-32B-Preview', 'ollama-qwq-32b']
    """
    paths = [Path(name).absolute() for name in names]  # links keep the names that the user gave them
    short = [path.name.removesuffix(".gguf") for path in paths]
    long = [f"{path.parent.name}-{name}" for path, name in zip(paths, short, strict=True)]
    alike = Counter(name.casefold() for name in short)
    labels: list[str] = []
    for name, of_two in zip(short, long, strict=True):
        stem = re.sub(r"[^\w.-]+", "-", of_two if alike[name.casefold()] > 1 else name).lstrip(".") or "model"
        taken = {label.casefold() for label in labels}
        numbered = (f"{stem}-{number}" for number in range(2, len(names) + 2))
        labels.append(next(each for each in (stem, *numbered) if each.casefold() not in taken))
    return labels


def check_models(
    choices: Mapping[str, Choice],
    question: str,
    *,
    system_prompt: str | None,
    chat_template: str | None,
    follow_links: bool,
) -> list[CheckedModel]:
    """Check every model, and that all read and write text with one tokenizer.

    choices: at least one by its label, each ready to be opened.
    question: one of the task, to try each chat template on.
    system_prompt: put first; None leaves what the template writes.
    chat_template: jinja text in place of the models' own.
    Raises LoadError or SourceError for a folder that is missing or damaged; OptionError for two tokenizers in one
    table; PromptError where the chat template is missing or fails.
    """
    checked, first = [], None
    folders = [choice.folder.resolve() for choice in choices.values()]
    if twice := [folder for place, folder in enumerate(folders) if folder in folders[:place]]:
        raise OptionError(f"model names {twice[0]} twice, expected each model once.")
    for label, choice in choices.items():
        files = open_model_folder(choice.folder, follow_links=follow_links)
        tokenizer = load_tokenizer(files.path, vocab_size=files.config.vocab_size)
        first = first or (files.path, tokenizer)
        check_same_tokenizer(*first, files.path, tokenizer)
        if chat_template is not None:
            tokenizer = replace(tokenizer, chat_template=chat_template)
        try:
            n_prompt = len(prompt_ids(tokenizer, question, system_prompt=system_prompt, context=_MAX_PROMPT))
        except PromptError as error:
            raise PromptError(f"{files.path}: {error}") from error
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
                names_sampling=_names_sampling(files),
                n_prompt=n_prompt,
            )
        )
    return checked


def _names_sampling(files: ModelFolder) -> bool:
    return read_generation_defaults(files.path, vocab_size=files.config.vocab_size).temperature is not None
