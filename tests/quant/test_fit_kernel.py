"""The compiled fit gives the bytes of a plain one in numpy, wherever its weights lie, and is there on every disk."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_fit import plain_fit
from rows import PACKINGS, awkward_rows

from qwq_mlx.errors import BackendError
from qwq_mlx.quant import compiled_fit
from qwq_mlx.quant.fit import FittedGroups, fit_groups
from qwq_mlx.quant.packing import DTYPES, Packing, round_to

SETTINGS = {"NUMBA_OPT": "0", "NUMBA_BOUNDSCHECK": "1"}
AFFINE = [packing for packing in PACKINGS if packing.is_affine]


def assert_plain(
    groups: np.ndarray, dtype: str, packing: Packing, stored: str, importance: np.ndarray | None = None
) -> None:
    found = fit_groups(groups, dtype, bits=packing.bits, stored=stored, importance=importance)
    with np.errstate(all="ignore"):
        expected = plain_fit(groups, dtype, packing.bits, stored, importance)
    assert np.array_equal(found.codes, expected.codes)
    for name in ("scales", "biases", "errors", "weights2"):
        assert getattr(found, name).tobytes() == getattr(expected, name).tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packing", AFFINE, ids=lambda p: f"{p.bits}-g{p.group_size}")
def test_every_byte_is_that_of_plain_numpy(packing: Packing, dtype: str) -> None:
    rows = awkward_rows(packing.bits)
    rows[9] *= np.float32(1e-2)  # float16 has no more than 65,504
    more = np.random.default_rng(packing.group_size).standard_t(3, (64, 256)).astype(np.float32)
    groups = round_to(np.concatenate([rows, more]), dtype).reshape(-1, packing.group_size)
    importance = np.random.default_rng(1).uniform(0.05, 2, packing.group_size).astype(np.float32) ** 2
    for stored in DTYPES:
        assert_plain(groups, dtype, packing, stored)
        assert_plain(groups, dtype, packing, stored, importance)


@given(st.integers(0, 2**32 - 1), st.sampled_from(AFFINE), st.sampled_from(list(DTYPES)))
@settings(max_examples=100, deadline=None)
def test_so_it_is_on_any_finite_bfloat16(seed: int, packing: Packing, stored: str) -> None:
    raw = np.random.default_rng(seed).integers(0, 1 << 16, (6, 128), np.uint16)
    raw[(raw & 0x7F80) > 0x4600] &= 0xBFFF  # up to 2**13, since float16's scales are to be numbers
    assert_plain(raw.reshape(-1, packing.group_size), "BF16", packing, stored)


def test_scales_and_biases_are_rounded_as_numpy_rounds_them() -> None:
    """To float16, down to its smallest and beyond its largest; a group of equal weights has its bias stored exactly."""
    sizes = np.concatenate([np.geomspace(1e-9, 6e4, 4000), [65519.9, 65520, 1e5, 0]]).astype(np.float32)
    values = np.concatenate([sizes, -sizes])
    groups = np.zeros((len(values), 32), np.float32)
    groups[:, 0] = values  # the bias, and all steps of the scale
    found = fit_groups(groups, "F32", bits=8, stored="F16", is_refined=False)
    exact = fit_groups(groups, "F32", bits=8, stored="F32", is_refined=False)
    with np.errstate(over="ignore"):
        for ours, whole in ((found.scales, exact.scales), (found.biases, exact.biases)):
            assert np.array_equal(ours, whole.astype(np.float16).astype(np.float32))


def parts(fitted: FittedGroups) -> list[bytes]:
    return [each.tobytes() for each in (fitted.codes, fitted.scales, fitted.biases, fitted.errors, fitted.weights2)]


@pytest.mark.parametrize("n_groups", [0, 1, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_where_weights_lie_changes_nothing(dtype: str, n_groups: int) -> None:
    random = np.random.default_rng(n_groups)
    groups = round_to(random.standard_normal((n_groups, 64)).astype(np.float32), dtype)
    expected = parts(fit_groups(groups, dtype, bits=3, stored=dtype))
    n_bytes = groups.nbytes
    shifted = np.zeros(n_bytes + 1, np.uint8)[1:]  # at an odd address
    shifted[:] = np.ascontiguousarray(groups).view(np.uint8).reshape(-1)
    places = [np.asfortranarray(groups), shifted.view(DTYPES[dtype]).reshape(groups.shape), groups.copy()]
    places.append(np.repeat(groups, 2, axis=1)[:, ::2])
    places.append(groups[::-1].copy()[::-1])
    places[2].flags.writeable = False
    for place in places:
        assert parts(fit_groups(place, dtype, bits=3, stored=dtype)) == expected


def test_code_is_kept_where_it_can_be_and_damage_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    blocked, kept = tmp_path / "file" / "fit.o", tmp_path / "cache" / "fit.o"
    monkeypatch.setattr(compiled_fit, "_paths", lambda: (blocked, kept))
    assert not compiled_fit.is_compiled()
    for name, value in SETTINGS.items():  # with each of these numba's code would call what is not there
        monkeypatch.setenv(name, value)
    code = compiled_fit._compile()
    assert compiled_fit.is_compiled() and compiled_fit._kept() == code
    kept.write_bytes(kept.read_bytes()[:-1])
    assert not compiled_fit.is_compiled()
    monkeypatch.setattr(compiled_fit, "_paths", lambda: (blocked, tmp_path / "file"))
    assert not compiled_fit.is_compiled()


def test_settings_for_other_programs_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core import config

    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    config.reload_config()
    with compiled_fit._without_settings():
        assert (config.DISABLE_JIT, config.BOUNDSCHECK, int(config.OPT)) == (0, None, 3)
    assert (config.DISABLE_JIT, config.BOUNDSCHECK, int(config.OPT)) == (1, 1, 0)
    monkeypatch.undo()
    config.reload_config()
    assert config.DISABLE_JIT == 0


@pytest.mark.parametrize("missing", ["numba", "llvmlite"])
def test_without_numba_the_error_says_what_to_do(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(compiled_fit, "_loaded", compiled_fit._loaded.__wrapped__)
    monkeypatch.setattr(compiled_fit, "_paths", lambda: (tmp_path / "fit.o",))
    with pytest.raises(BackendError, match=rf"ModuleNotFoundError: .*{missing}.*pip install --upgrade numba numpy"):
        compiled_fit.fit_kernel()


def test_code_that_somebody_else_may_have_written_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its digest is right: who can write the code can write that, too."""
    monkeypatch.setattr(compiled_fit, "_paths", lambda: (tmp_path / "fit.o",))
    before = os.umask(0)  # whoever lets all others write, does not let them write this
    try:
        compiled_fit._keep(b"code")
    finally:
        os.umask(before)
    assert compiled_fit._kept() == b"code"
    for mode in (0o664, 0o646):
        (tmp_path / "fit.o").chmod(mode)
        assert compiled_fit._kept() is None
    (tmp_path / "fit.o").chmod(0o644)
    assert compiled_fit._kept() == b"code"
    monkeypatch.setattr(compiled_fit, "_trusted_owners", lambda: {os.getuid() + 1})
    assert compiled_fit._kept() is None


def test_where_all_files_can_be_written_by_all_the_next_place_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """exFAT, or a drive of Windows in WSL."""
    first, second = tmp_path / "shared" / "fit.o", tmp_path / "own" / "fit.o"
    monkeypatch.setattr(compiled_fit, "_paths", lambda: (first, second))
    write = compiled_fit.write_file

    def written(path: Path, data: bytes, **given: int) -> None:
        write(path, data, **given)
        path.chmod(0o777 if path == first else 0o644)

    monkeypatch.setattr(compiled_fit, "write_file", written)
    compiled_fit._keep(b"code")
    assert second.exists() and compiled_fit._kept() == b"code"


def test_a_change_of_source_version_or_processor_is_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_fit, "_paths", compiled_fit._paths.__wrapped__)
    before = compiled_fit._paths()
    assert before == compiled_fit._paths()
    monkeypatch.setattr(compiled_fit, "version", lambda name: "another")
    assert {path.name for path in before}.isdisjoint(path.name for path in compiled_fit._paths())


def test_a_user_without_a_home_has_one_place_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert len(compiled_fit._paths.__wrapped__()) == 1
