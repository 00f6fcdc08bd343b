"""Where a GGUF lies: a file, a model that Ollama pulled, or one that LM Studio downloaded.

    FILE.gguf                       the file; of a split one any part
    ollama:NAME[:TAG]               as `ollama list` names it: qwq:32b-preview-q4_K_M, hf.co/OWNER/REPO:Q4_K_M
    lmstudio:PUBLISHER/REPO[/FILE]  a folder of LM Studio's, the file where it has several

Ollama keeps a model as blobs/sha256-DIGEST, named by manifests/HOST/NAMESPACE/NAME/TAG, in $OLLAMA_MODELS or
~/.ollama/models (its Linux service: /usr/share/ollama/.ollama/models). LM Studio has models/PUBLISHER/REPO/*.gguf in
~/.lmstudio, in the downloadsFolder of ~/.lmstudio/settings.json, or in ~/.cache/lm-studio.

Does not: open a GGUF, ask Ollama or LM Studio for anything, or touch their files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qwq_mlx.errors import OptionError, SourceError, system_said
from qwq_mlx.files.json_object import read_json_object

__all__ = ["GgufFile", "find_gguf"]

_OLLAMA, _LMSTUDIO = "ollama:", "lmstudio:"
_OLLAMA_SERVICE = Path("/usr/share/ollama/.ollama/models")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_PORT = re.compile(r":\d{1,5}$")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_MODEL_LAYER = "application/vnd.ollama.image.model"
_ADAPTER_LAYER = "application/vnd.ollama.image.adapter"
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
_MAX_MANIFEST_BYTES = 1 << 20
_MAX_LISTED = 20
_MAX_ENTRIES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """A GGUF that was named. label: what the user called it. sha256: that its store says it has, or None."""

    path: Path
    label: str
    sha256: str | None = None


def find_gguf(source: str | Path) -> GgufFile | None:
    """The file that a source names; None where it names no GGUF (a folder, a repository of the Hub).

    Raises OptionError for a name that cannot be one, SourceError where nothing of that name is there, with what is.
    """
    text = str(source)
    if os.path.lexists(source):
        return GgufFile(path=Path(source), label=Path(source).name) if _is_gguf(Path(source)) else None
    if text.startswith(_OLLAMA):
        return _ollama(text.removeprefix(_OLLAMA))
    if text.startswith(_LMSTUDIO):
        return _lmstudio(text.removeprefix(_LMSTUDIO))
    if text.endswith(".gguf"):
        raise SourceError(f"{text}: there is no such file. Give the path of a GGUF file.")
    return None


def _is_gguf(path: Path) -> bool:
    if path.suffix == ".gguf":
        return not path.is_dir()
    if not path.is_file():  # a FIFO would block
        return False
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise SourceError(f"{path}: cannot be read {system_said(error, 'Check its permissions.')}") from error


def _ollama(name: str) -> GgufFile:
    label = _OLLAMA + name
    repository, _, tag = name.rpartition(":") if ":" in name.rpartition("/")[2] else (name, "", "")
    parts = repository.split("/")
    host, namespace, model = [*("registry.ollama.ai", "library", "")[: 3 - len(parts)], *parts][:3]
    names = (host, namespace, model, tag or "latest")
    if len(parts) > 3 or not all(_PART.fullmatch(each) for each in (_PORT.sub("", host), *names[1:])):
        raise OptionError(
            f"{label}: is no name of Ollama's, expected ollama:NAME[:TAG] as `ollama list` shows it, for example "
            "ollama:qwq:32b-preview-q4_K_M."
        )
    folders = [folder for folder in _ollama_folders() if (folder / "manifests").is_dir()]
    if not folders:
        searched = " or ".join(map(str, _ollama_folders()))
        raise SourceError(
            f"{label}: Ollama has no models in {searched}. Set OLLAMA_MODELS to its models folder, or give the path of "
            "a GGUF file."
        )
    for folder in folders:
        manifest = folder.joinpath("manifests", *names)
        if manifest.is_file():
            return _ollama_blob(folder, manifest, label)
    there = sorted(_ollama_names(folders))
    same = [each for each in there if each.rpartition(":")[0] == repository]
    what = f"has no tag {names[3]!r}; its tags there" if same else "is not there; models there"
    raise SourceError(f"{label}: {what}: {_listed(same or there)}. Give one of these, or run: ollama pull {name}")


def _ollama_folders() -> list[Path]:
    named = os.environ.get("OLLAMA_MODELS")
    return [Path(named)] if named else [Path.home() / ".ollama" / "models", _OLLAMA_SERVICE]


def _ollama_blob(folder: Path, manifest: Path, label: str) -> GgufFile:
    advice = f"Pull it again: ollama pull {label.removeprefix(_OLLAMA)}"
    layers = read_json_object(manifest, limit_bytes=_MAX_MANIFEST_BYTES, advice=advice).get("layers")
    entries = [each for each in layers if isinstance(each, dict)] if isinstance(layers, list) else []
    kinds = [each.get("mediaType") for each in entries]
    if _ADAPTER_LAYER in kinds:
        raise SourceError(
            f"{label}: is a model with a LoRA adapter beside it, expected a whole model. Give the model that it was "
            "made from (FROM in `ollama show --modelfile`)."
        )
    models = [each for each in entries if each.get("mediaType") == _MODEL_LAYER]
    if len(models) != 1:
        raise SourceError(
            f"{label}: its manifest has {len(models)} layers of a GGUF, expected 1 ({manifest}). Tags that end in -mlx "
            "have none; give another tag."
        )
    digest, size = models[0].get("digest"), models[0].get("size")
    match = _DIGEST.fullmatch(digest) if isinstance(digest, str) else None
    if match is None:
        raise SourceError(f"{manifest}: digest is {str(digest)[:80]!r}, expected sha256:... {advice}")
    blob = folder / "blobs" / f"sha256-{match[1]}"
    if not blob.is_file():
        raise SourceError(f"{label}: {blob} is not there, which its manifest names. {advice}")
    if (actual := blob.stat().st_size) != size:
        raise SourceError(f"{label}: {blob} has {actual:,} bytes, its manifest says {size!r:.30}. {advice}")
    return GgufFile(path=blob, label=label, sha256=match[1])


def _ollama_names(folders: Iterable[Path]) -> Iterator[str]:
    """Every model with its tag, as `ollama list` shows them."""
    for folder in folders:
        for index, path in enumerate((folder / "manifests").glob("*/*/*/*")):
            if index == _MAX_ENTRIES:
                break
            host, namespace, model, tag = path.relative_to(folder / "manifests").parts
            shown = (
                (host, namespace) if host != "registry.ollama.ai" else (namespace,) if namespace != "library" else ()
            )
            yield f"{'/'.join((*shown, model))}:{tag}"


def _lmstudio(name: str) -> GgufFile:
    label = _LMSTUDIO + name
    parts = name.split("/")
    if len(parts) not in (2, 3) or not all(_PART.fullmatch(each) for each in parts):
        raise OptionError(
            f"{label}: is no name of LM Studio's, expected lmstudio:PUBLISHER/REPO or "
            "lmstudio:PUBLISHER/REPO/FILE.gguf."
        )
    folders = _lmstudio_folders()
    for folder in folders:
        repository = folder.joinpath(*parts[:2])
        if not repository.is_dir():
            continue
        files = sorted(
            path.name
            for path in repository.glob("*.gguf")
            if "mmproj" not in path.name.lower() and not _LATER_PART.search(path.name)
        )
        wanted = files if len(parts) == 2 else [each for each in files if each == parts[2]]
        if len(wanted) == 1:
            return GgufFile(path=repository / wanted[0], label=label)
        if not files:
            raise SourceError(f"{label}: {repository} holds no GGUF of a model. Download one in LM Studio.")
        what = "holds several" if len(parts) == 2 else f"has no {parts[2]}; it holds"
        example = "/".join([*parts[:2], files[0]])
        raise SourceError(f"{label}: {repository} {what}: {_listed(files)}. Name one of them: {_LMSTUDIO}{example}")
    there = sorted({f"{each.parent.parent.name}/{each.parent.name}" for folder in folders for each in _ggufs(folder)})
    searched = ", ".join(map(str, folders)) or "any of its folders"
    models = f" Models there: {_listed(there)}." if there else ""
    raise SourceError(f"{label}: is not in {searched}.{models} Give one that is, or the path of a GGUF file.")


def _ggufs(folder: Path) -> Iterator[Path]:
    for index, path in enumerate(folder.glob("*/*/*.gguf")):
        if index == _MAX_ENTRIES:
            return
        yield path


def _lmstudio_folders() -> list[Path]:
    home = Path.home()
    folders = [home / ".lmstudio" / "models", home / ".cache" / "lm-studio" / "models"]
    settings = home / ".lmstudio" / "settings.json"
    if settings.is_file():
        value = read_json_object(settings, limit_bytes=_MAX_MANIFEST_BYTES, advice="Open LM Studio's settings once.")
        chosen = value.get("downloadsFolder")
        if isinstance(chosen, str) and chosen:
            folders.insert(0, Path(chosen).expanduser())
    return [folder for folder in folders if folder.is_dir()]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED:,} more" if len(names) > _MAX_LISTED else ""
    shown = (each if each.isprintable() else repr(each) for each in names[:_MAX_LISTED])  # names of anybody's files
    return (", ".join(shown) or "none") + more
