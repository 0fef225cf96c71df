"""ONNX folders that many tests read, made once a session at the cheapest depth."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.folder import export_checkpoint
from export.job import ExportOptions


@pytest.fixture(scope="session")
def onnx_fp32(mini_vega: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All five components with open dimensions."""
    out = tmp_path_factory.mktemp("onnx") / "fp32"
    export_checkpoint(mini_vega, out, options=ExportOptions(precision="fp32"), source_name="random:mini-vega")
    return out


@pytest.fixture(scope="session")
def onnx_fp16(mini_vega: Path, onnx_fp32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All five, the VAE in fp32 and taken from the other folder."""
    out = tmp_path_factory.mktemp("onnx") / "fp16"
    export_checkpoint(mini_vega, out, options=ExportOptions(precision="fp16", reuse=(onnx_fp32,)))
    return out
