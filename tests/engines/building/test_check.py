"""Which flavors run here, asked of a machine without a GPU."""

from __future__ import annotations

import pytest

from engines.building.check import check_apart, check_flavor


def test_onnx_runtime_builds_and_runs_here() -> None:
    answer = check_apart("onnxruntime")
    assert answer.startswith("yes, ") and " on c" in answer
    assert check_apart("onnxruntime", seconds=0.01) == "no: it did not answer in 0.01 s"


def test_a_flavor_that_does_not_run_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.gpus.gpu_at_hand", lambda: ("NVIDIA H100", "9.0"))
    assert "8.6, 8.9, 12.0, 12.1, found NVIDIA H100 (compute capability 9.0)" in check_flavor("tensorrt-rtx")
    assert check_flavor("openvino").startswith("no: unknown flavor 'openvino'")
