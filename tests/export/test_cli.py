from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "export", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--opset", "99"], "opset 99 is not supported: allowed are 18"),
        (["--resolutions", "128x100"], "resolution 128x100: both sides must be multiples of 32"),
        (["--resolutions", "big"], "is not of the form WIDTHxHEIGHT"),
        (["--components", "unet,vae"], "unknown component 'vae'"),
        (["--lora-scale", "1.0"], "1 values of --lora-scale for 0 of --lora"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(mini_vega: Path, tmp_path: Path, words: list[str], message: str) -> None:
    done = run("onnx", "--model", mini_vega, "--out", tmp_path / "out", "--workdir", tmp_path, *words)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and done.stderr.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_export_then_verify(mini_vega: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("onnx", "--model", mini_vega, "--out", out, "--components", "text_encoder_2", "--workdir", tmp_path)
    assert done.returncode == 0, done.stderr
    verified = run("verify", out, "--workdir", tmp_path)
    assert verified.returncode == 0, verified.stderr
    assert "text_embeds" in verified.stdout and "FAILED" not in verified.stdout


def test_one_static_size_is_exported_and_no_other_is_verified(mini_vega: Path, tmp_path: Path) -> None:
    out, component = tmp_path / "out", ["--components", "vae_decoder,text_encoder"]
    size = ["--resolutions", "160x96", "--batch", "1"]
    done = run("onnx", "--model", mini_vega, "--out", out, *component, *size, "--workdir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (out / "vae_decoder").glob("*.onnx")) == ["model.onnx"]
    assert run("verify", out, "--workdir", tmp_path).returncode == 0
    refused = run("verify", out, "--resolutions", "128x128", "--workdir", tmp_path)
    assert refused.returncode == 2 and "static graphs '128x128': known are 160x96" in refused.stderr
