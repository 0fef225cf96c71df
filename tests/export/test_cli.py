from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from export.__main__ import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command's exit code, and what it printed to stdout and to stderr."""

    def run_command(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["export", *map(str, words), "--workdir", str(tmp_path)])
        return (main(), *capsys.readouterr())

    return run_command


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
def test_bad_input_is_one_line_and_exit_code_2(
    run: Run, mini_vega: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    code, _, told = run("onnx", "--model", mini_vega, "--out", tmp_path / "out", *words)
    assert code == 2 and message in told and told.count("\n") == 1, told
    assert not (tmp_path / "out").exists()


def test_one_static_size_is_exported_and_no_other_is_verified(run: Run, mini_vega: Path, tmp_path: Path) -> None:
    out, components = tmp_path / "out", ["--components", "vae_decoder,text_encoder_2"]
    size = ["--resolutions", "160x96", "--batch", "1"]
    code, _, told = run("onnx", "--model", mini_vega, "--out", out, *components, *size)
    assert code == 0, told
    assert sorted(path.name for path in (out / "vae_decoder").glob("*.onnx")) == ["model.onnx"]
    code, said, told = run("verify", out)
    assert code == 0 and "text_embeds" in said and "FAILED" not in said, told
    code, _, told = run("verify", out, "--resolutions", "128x128")
    assert code == 2 and "static graphs '128x128': known are 160x96" in told
