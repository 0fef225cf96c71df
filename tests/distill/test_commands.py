"""What is wrong with a command is told before any work: one line, exit code 2, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.__main__ import main


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("judge --model mini:sdxl --count 100", "100 pictures are not as many of each of the 9 sizes"),
        ("judge --model mini:sdxl --count 0", "0 pictures are not"),
        ("judge --model mini:sdxl --count 9000000000000", "9000000000000 pictures; the most is 900000"),
        ("few-steps --results {}", "no model to compare: give NAME=MODEL@STEPS"),
        ("judge --model mini:sdxl --steps 0", "--steps is 0; the least is 1"),
        ("ablate --out {} --seeds 0", "--seeds is 0; the least is 1"),
        ("ablate --out {} --pictures 10", "10 pictures are not"),
        ("ablate --out {} --held-out 19", "--held-out is 19; the least is 20"),
        ("surgery --model mini:sdxl --student ssd-1b --out {}", "ssd-1b is of the family sdxl, "),
        ("cache --data shapes:9 --out {} --batch 0", "--batch is 0; the least is 1"),
        ("bench --out {} --batch 0", "--batch is 0; the least is 1"),
        ("memory --recipe mini-vega --fsdp", "--fsdp shares a model over processes, and there is one"),
        ("memory --recipe mini-vega --fsdp --processes 2 --mixed-precision fp16", "use --mixed-precision bf16"),
        ("memory --recipe mini-vega --memory-gb 0", "--memory-gb is 0.0; it must be above 0"),
        ("memory --recipe mini-vega --processes 0", "--processes is 0; the least is 1"),
        (
            "importance --model mini:sdxl --cache none --student mini-vega --out {} --samples 0",
            "--samples is 0; the least",
        ),
        (
            "importance --model mini:sdxl --cache none://b/c --student mini-vega --out {}",
            "none://b/c cannot be read here: Protocol not known: none",
        ),
        ("judge --model mini:sdxl --held-out none://b/c", "none://b/c cannot be read here: Protocol not known: none"),
        ("cache --data none://b/c-{{0..9}}.tar --out {}", "none://b cannot be read here: Protocol not known: none"),
        ("cache --data s3://c-{{0..9}}.tar --out {}", "names its host or bucket whole"),
        ("cache --data shapes:9 --out s3://b/cache", "--out s3:/b/cache is an URL; it takes a place on this machine"),
        ("cache --data shapes:9 --out {} --variants 1001", "--variants is 1001; the most is 1000"),
        ("cache --data shapes:9 --out {} --seed -1", "--seed is -1; the least is 0"),
        ("cache --data shapes:9 --out {} --variants 0", "--variants is 0; the least is 1"),
        ("cache --data shapes:² --out {}", "shapes:N needs a whole number"),
        ("cache --data= --out {}", "--data is empty"),
        ("bench --out {} --rounds 0", "--rounds is 0; the least is 1"),
        ("teach --out {} --start missing", "model 'missing' is neither a folder"),
        ("fetch --model mini:vega", "unknown mini checkpoint 'vega'"),
        ("fetch --model missing.safetensors", "model 'missing.safetensors' does not exist"),
        ("train --recipe ssd-2b --cache c --out {}", "unknown recipe 'ssd-2b'"),
        ("cache --data nowhere --out {}", "nowhere"),
    ],
)
def test_told_at_the_door(
    arguments: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["distill", *arguments.format(out).split()])
    assert main() == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and told in said[0], said
    assert not out.exists()
