from __future__ import annotations

from pathlib import Path

from qwq_mlx.doctor.check import Subject
from qwq_mlx.doctor.few_rows import check_few_rows


def test_a_machine_without_an_nvidia_gpu_is_told_that_the_kernels_do_not_run_there(tmp_path: Path) -> None:
    result = check_few_rows(Subject("cpu", tmp_path))
    assert result.outcome == "not checkable"
    assert "cpu" in result.found and "NVIDIA" in result.found
