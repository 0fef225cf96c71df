"""The road at full size, as far as it goes with no GPU: the true Vega, exported and built for two GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _run(*arguments: object, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_full_size_vega_becomes_plans_for_the_a100_and_the_rtx_4090(tmp_path: Path) -> None:
    _run("export", "onnx", "--model", "random:vega", "--out", tmp_path / "onnx", "--no-check", cwd=tmp_path)
    about = json.loads((tmp_path / "onnx" / "unet" / "export.json").read_text())
    assert about["parameters"] == 745_225_604
    bundle = tmp_path / "bundle"
    build = ("engines", "build", "--onnx", tmp_path / "onnx", "--out", bundle, "--gpus", "a100,rtx4090")
    _run(*build, cwd=tmp_path)
    manifest = json.loads((bundle / "manifest.json").read_text())
    engines = {engine["component"]: engine for engine in manifest["engines"]}
    assert engines.keys() == {"unet", "vae_decoder", "text_encoder", "text_encoder_2"}
    unet = engines["unet"]
    assert len(unet["resolutions"]) == 9 and unet["compute_capabilities"] == ["8.0", "8.9"]
    weights_bytes = 2 * 745_225_604
    assert weights_bytes < sum(file["size_bytes"] for file in unet["files"]) < 1.03 * weights_bytes
    _run("engines", "verify", bundle, cwd=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*.plan")}
    _run(*build, cwd=tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in bundle.rglob("*.plan")}
