"""Run a receipt again and find the first id that is another.

The run stops at the first difference, except where the run may take tokens back (on_loop "nudge"): there it goes to its
end first. What a person did at some moment cannot be repeated, so an interrupted run is compared as far as it came, and
one that was asked for its answer up to there.

Does not: load models (the command does), or judge how much a difference matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwq_mlx.errors import SourceError
from qwq_mlx.generate.checkpoint.file import model_digest
from qwq_mlx.generate.reasoner import Reasoner
from qwq_mlx.generate.receipt import Receipt, here, text_digest

__all__ = ["Difference", "Replay", "check_model", "replay"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first place where the outputs part: an output index, and the id there on each side with its text alone.

    None: that side has ended. Where all ids are the same but the text is not, both ids are None.
    """

    index: int
    expected_id: int | None
    expected_text: str
    found_id: int | None
    found_text: str

    def __str__(self) -> str:
        if self.expected_id is None and self.found_id is None:
            return "all ids are the same, their text is not: the tokenizer is another"
        sides = [
            f"{name} {'the end' if token_id is None else f'id {token_id:,} {text!r}'}"
            for name, token_id, text in (
                ("expected", self.expected_id, self.expected_text),
                ("found", self.found_id, self.found_text),
            )
        ]
        return f"token {self.index:,}: {', '.join(sides)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """n_compared: ids that are the same. n_expected: ids of the receipt that can be compared, of n_ids it has.

    changed: what differs here besides, for example "mlx 0.32.4, the receipt's is 0.32.2". difference: None: the same.
    """

    n_compared: int
    n_expected: int
    n_ids: int
    changed: tuple[str, ...]
    difference: Difference | None


def check_model(reasoner: Reasoner, receipt: Receipt) -> None:
    """Raises SourceError where the weights are others than the receipt's."""
    folder = reasoner.model.folder
    if model_digest(folder) != receipt.model["sha256"]:
        raise SourceError(
            f"{folder}: is another model than {receipt.model['name']!r} ({receipt.model['weights']}) of the receipt; "
            "their digests differ. Give its folder as `model`, or compare all the same with `other_weights=True`."
        )


def replay(reasoner: Reasoner, receipt: Receipt, *, progress: Callable[[int, int], None] | None = None) -> Replay:
    """Run it again. progress: ids done and ids to compare. Raises as `Reasoner.rerun` and a run do."""
    n_expected = _n_comparable(receipt)
    run = reasoner.rerun(receipt)
    may_go_back = receipt.settings["thinking"]["on_loop"] == "nudge"
    ids: list[int] = []
    for step in run:
        del ids[step.index :]
        ids.append(step.id)
        if progress is not None:
            progress(len(ids), n_expected)
        is_other = step.index < n_expected and step.id != receipt.ids[step.index]
        if not may_go_back and (is_other or (len(ids) == n_expected < len(receipt.ids))):
            break
        if len(ids) == n_expected and receipt.finish_reason == "interrupted":
            break
    pairs = zip(ids, receipt.ids[:n_expected], strict=False)
    index = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
    if index is None and (len(ids) < n_expected or (len(ids) > n_expected and _is_whole(receipt))):
        index = min(len(ids), n_expected)
    difference = None if index is None else _difference(reasoner, receipt.ids[:n_expected], ids, index)
    if difference is None and _is_whole(receipt) and text_digest(run.trace().text) != receipt.text_sha256:
        difference = Difference(index=len(ids), expected_id=None, expected_text="", found_id=None, found_text="")
    n_same = index if index is not None else min(len(ids), n_expected)
    return Replay(
        n_compared=n_same,
        n_expected=n_expected,
        n_ids=len(receipt.ids),
        changed=_changed(reasoner, receipt),
        difference=difference,
    )


def _n_comparable(receipt: Receipt) -> int:
    asked: list[int] = [each["start"] for each in receipt.injections if each["reason"] == "answered"]
    return min([len(receipt.ids), *asked])


def _is_whole(receipt: Receipt) -> bool:
    return receipt.finish_reason != "interrupted" and _n_comparable(receipt) == len(receipt.ids)


def _difference(reasoner: Reasoner, expected: Sequence[int], actual: Sequence[int], index: int) -> Difference:
    sides = [side[index] if index < len(side) else None for side in (expected, actual)]
    texts = ["" if each is None else reasoner.pieces[each].decode("utf-8", "replace") for each in sides]
    return Difference(index=index, expected_id=sides[0], expected_text=texts[0], found_id=sides[1], found_text=texts[1])


def _changed(reasoner: Reasoner, receipt: Receipt) -> tuple[str, ...]:
    machine = here(reasoner.model)
    pairs = [(name, machine["versions"].get(name), value) for name, value in receipt.versions.items()]
    pairs += [("backend", machine["backend"], receipt.backend), ("system", machine["system"], receipt.system)]
    pairs += [("compute type", reasoner.model.compute_type, receipt.model["compute_type"])]
    for name in ("tokenizer_sha256", "template_sha256"):
        pairs.append((name.replace("_sha256", ""), machine[name][:12], getattr(receipt, name)[:12]))
    return tuple(f"{name} {here_}, the receipt's is {there}" for name, here_, there in pairs if here_ != there)
