"""Whether two folders are taken for one model."""

from __future__ import annotations

from pathlib import Path

from qwq_mlx.files.model_identity import model_identity


def _folder(path: Path, **files: bytes) -> Path:
    path.mkdir()
    for name, content in {"config": b"{}", "weights": bytes(200_000), **files}.items():
        (path / name).write_bytes(content)
    return path


def test_what_a_desktop_leaves_in_a_folder_makes_no_other_model_of_it(tmp_path: Path) -> None:
    copy = _folder(tmp_path / "copy", **{".DS_Store": b"Bud1", "._weights": b"x"})
    assert model_identity(_folder(tmp_path / "a")) == model_identity(copy)


def test_models_of_equal_sizes_are_told_apart_by_their_last_bytes(tmp_path: Path) -> None:
    """As two that were trained from one are."""
    trained = _folder(tmp_path / "b", weights=bytes(199_999) + b"\x01")
    assert model_identity(_folder(tmp_path / "a")) != model_identity(trained)
