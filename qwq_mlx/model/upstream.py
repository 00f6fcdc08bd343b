"""The one door to mlx, mlx_lm and transformers, so that importing them changes nothing else in the process.

Importing mlx_lm lowers the limit of open files and sets an environment variable; both are put back.

Does not: load a model (`load` does).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from types import ModuleType
from typing import Any

from qwq_mlx.errors import BackendError

__all__ = ["import_mlx", "import_mlx_lm", "import_transformers", "package_version"]


def import_mlx() -> ModuleType:
    """mlx.core, or BackendError where MLX is not installed or has no backend."""
    try:
        return importlib.import_module("mlx.core")
    except ImportError as error:
        raise BackendError(
            f"MLX cannot start on this machine ({error}). On a Mac with Apple silicon: pip install mlx. "
            "On Linux MLX needs a backend: pip install 'mlx[cpu]', or 'mlx[cuda13]' with an NVIDIA GPU."
        ) from error


def import_mlx_lm(name: str) -> Any:
    """Import a module of mlx_lm and put back what that changes: RLIMIT_NOFILE and the environment."""
    import resource

    import_mlx()
    import_transformers()  # mlx_lm imports it too, and then it would write to stderr where PyTorch is missing
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    environment = dict(os.environ)
    real = resource.setrlimit
    try:
        # Importing lowers the hard limit to 4096 (mlx-lm#1589), and an ordinary process cannot raise it again, so the
        # call itself must not happen. Only this name is exchanged, and only while the import runs.
        resource.setrlimit = _keep_limit
        return importlib.import_module(name)
    finally:
        resource.setrlimit = real
        if resource.getrlimit(resource.RLIMIT_NOFILE) != limit:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        for added in os.environ.keys() - environment.keys():
            del os.environ[added]
        os.environ.update(environment)


def _keep_limit(resource: int, limits: tuple[int, int], /) -> None:
    """Stand-in for resource.setrlimit while mlx_lm is imported."""


def package_version(name: str) -> str:
    """The version of an installed package; "none" where it is not (this one may run from a checkout)."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def import_transformers() -> Any:
    """transformers, without the word on stderr that PyTorch is missing: nothing here needs it."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        return importlib.import_module("transformers")
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
