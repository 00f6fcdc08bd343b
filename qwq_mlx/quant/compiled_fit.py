"""`fit_kernel` as machine code: compiled by numba once on a machine, kept, and called without the interpreter's lock.

The code lies where Python keeps its own (`__pycache__`), else in the user's cache folder, and where neither can be
written it is compiled again each time. Loading it takes LLVM alone: numba itself would cost every conversion 0.5 s and
110 MB more. A name holds the digest of all that the code follows from: sources, versions and the processor.

A digest in the file tells of damage, not of malice: whoever can write there can write it, too. So code is loaded only
from a file that this user, root or the owner of the sources has written, and that nobody else may write.

Does not: say what the kernel computes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qwq_mlx.errors import BackendError
from qwq_mlx.files.atomic import write_file
from qwq_mlx.files.user_folders import user_cache_folder

__all__ = ["fit_kernel", "is_compiled"]

_SOURCES = [Path(__file__).with_name(name) for name in ("fit_kernel.py", "least_squares.py", "compiled_fit.py")]
_NAME = "fit_groups"
_lock = threading.Lock()


@functools.cache
def _loaded() -> tuple[Callable[..., None], Any]:
    """The function, and what owns its code."""
    import llvmlite.binding as llvm

    code, target = _kept() or _compile(), _target()
    module = llvm.parse_assembly("")
    module.triple = target.triple
    engine = llvm.create_mcjit_compiler(module, target)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    number, pointer = ctypes.c_ssize_t, ctypes.c_void_p
    kinds = [pointer, *[number] * 8, pointer, ctypes.c_float, pointer, pointer, pointer]
    return ctypes.CFUNCTYPE(None, *kinds)(engine.get_function_address(_NAME)), engine


def fit_kernel() -> Callable[..., None]:
    """`fit_kernel.fit_groups`, pointers as whole numbers. The first call loads it, and compiles it where it must.

    Raises BackendError where numba or LLVM cannot.
    """
    with _lock, _explained():
        return _loaded()[0]


def is_compiled() -> bool:
    """Whether its code is kept from before, so that loading it takes milliseconds. Raises BackendError without LLVM."""
    with _explained():
        return _kept() is not None


@contextmanager
def _explained() -> Iterator[None]:
    """Errors of numba and LLVM as one that says what to do."""
    try:
        yield
    except (ImportError, RuntimeError) as error:
        raise BackendError(
            f"The fit of packed weights cannot be compiled or loaded here ({type(error).__name__}: {error}). "
            "It takes numba with its llvmlite, and a numpy that numba knows: pip install --upgrade numba numpy."
        ) from error


@contextmanager
def _without_settings() -> Iterator[None]:
    """numba without what the environment sets for other programs: to interpret, to check bounds, to compile slow code.

    All but the number of threads, which may not change any more once they run, and of which there are none here.
    """
    from numba.core import config

    names = [name for name in os.environ if name.startswith("NUMBA_") and name != "NUMBA_NUM_THREADS"]
    given = {name: os.environ.pop(name) for name in names}
    config.reload_config()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        os.environ.update(given)
        config.reload_config()  # type: ignore[no-untyped-call]


def _target() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        codemodel="jitdefault",
        jit=True,
    )


def _compile() -> bytes:
    """Machine code by numba, kept where it can be."""
    import llvmlite.binding as llvm
    from numba.core.errors import NumbaError

    target = _target()
    with _without_settings():
        from qwq_mlx.quant.fit_kernel import compiled

        try:
            function = compiled()
        except NumbaError as error:  # of a numba that is newer than this package, say
            raise RuntimeError(f"numba {version('numba')}: {error}") from error
        module = llvm.parse_assembly(function.inspect_llvm())
    for each in module.functions:
        if not each.is_declaration:
            each.linkage = "external" if each.name == function.native_name else "internal"
    module.get_function(function.native_name).name = _NAME
    builder = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=2))
    builder.getModulePassManager().run(module, builder)  # without the ways that lead to Python's errors: none is raised
    foreign = [each.name for each in module.functions if each.is_declaration and not each.name.startswith("llvm.")]
    if foreign:
        raise RuntimeError(f"the compiled fit calls {', '.join(foreign)}, expected nothing but itself.")
    code: bytes = target.emit_object(module)
    _keep(code)
    return code


def _keep(code: bytes) -> None:
    """Where it can be written so that it will be read: some file systems let everybody write every file."""
    for path in _paths():
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, hashlib.sha256(code).digest() + code, mode=0o644)
            if _read(path) is not None:
                return


def _kept() -> bytes | None:
    for path in _paths():
        with suppress(OSError):
            if (code := _read(path)) is not None:
                return code
    return None


def _read(path: Path) -> bytes | None:
    """None where the file is damaged, or somebody else may have written it. Raises OSError."""
    with path.open("rb") as file:
        about = os.fstat(file.fileno())
        if about.st_uid not in _trusted_owners() or about.st_mode & 0o022:
            return None
        data = file.read()
    return data[32:] if hashlib.sha256(data[32:]).digest() == data[:32] else None


def _trusted_owners() -> set[int]:
    """Users who can make this process run what they like as it is."""
    return {os.geteuid(), 0, _SOURCES[0].stat().st_uid}


@functools.cache
def _paths() -> tuple[Path, ...]:
    """Where the code is kept, the best place first."""
    import llvmlite.binding as llvm

    parts = [path.read_bytes() for path in _SOURCES]
    machine = f"{llvm.get_default_triple()} {llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"
    parts += [each.encode() for each in (version("numba"), version("llvmlite"), machine)]
    name = f"fit-{hashlib.sha256(b''.join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]}.o"
    beside = Path(importlib.util.cache_from_source(str(_SOURCES[0])))
    with suppress(RuntimeError):  # a user without a home
        return beside.with_name(name), user_cache_folder(os.environ) / name
    return (beside.with_name(name),)
