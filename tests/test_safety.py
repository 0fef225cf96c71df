"""No command of any room touches a folder or a file that it did not make, and no input ends in a traceback."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

FILES = {  # a trained student, a web page, an editor's settings, pictures: whatever a folder may hold
    "unet/diffusion_pytorch_model.safetensors": "the weights of a week",
    "unet/config.json": "{}",
    "unet/model.onnx": "a graph",
    "text_encoder/model.safetensors": "more weights",
    "tokenizer/vocab.json": "{}",
    "scheduler/scheduler_config.json": "{}",
    "slimxl.json": json.dumps({"student": "mine", "stages_done": 3}),
    "manifest.json": json.dumps({"name": "my web app", "icons": []}),
    "settings.json": json.dumps({"editor.fontSize": 14}),
    "cache.json": json.dumps({"http": 1}),
    "index.html": "<html>my page</html>",
    "report.md": "# mine",
    "report.json": json.dumps({"mine": True}),
    "importance.svg": "<svg/>",
    "ablation.md": "# mine",
    "teacher.json": "{}",
    "photo.jpg": "a picture",
    "numbers.json": json.dumps([1, 2, 3]),
    "numbers-exports/ours/thesis.tex": "the only copy",
    "fresh-exports/ours/thesis.tex": "the only copy",
    "fresh.unfinished.json": json.dumps({"mine": True}),
    "shard-000000.safetensors": "mine",
    "work/kernels/mine.cu": "__global__",
    "runs/mine/run.log": "mine",
    "8000/log": "mine",
    "random-mini-vega/thesis.tex": "the only copy",
}
WRITERS = {
    "engines build": "build --flavor onnxruntime --onnx {onnx} --out {home}",
    "engines build, over its own ONNX folder": "build --flavor onnxruntime --onnx {onnx} --out {onnx}",
    "engines build, inside its ONNX folder": "build --flavor onnxruntime --onnx {onnx} --out {onnx}/bundle",
    "engines prune": "prune {home}",
    "engines triton": "triton --bundle {bundle} --out {home}",
    "engines compare": "compare {bundle} {bundle} --out {home}/numbers.json",
    "engines load-test": "load-test --out {home}/photo.jpg",
    "export onnx": "onnx --model {model} --out {home}",
    "export verify": "verify {onnx} --out {home}/numbers.json",
    "export bench": "bench --model {model} --out {home}/numbers.json",
    "export bench, its exports": "bench --model {model} --out {home}/fresh.json",
    "distill cache": "cache --data shapes:4 --model {model} --out {home}",
    "distill fetch": "fetch --model random:mini-vega --workdir {home}",
    "distill train": "train --recipe mini-vega --cache {home}/none --out {home}",
    "distill surgery": "surgery --model {model} --student mini-vega --out {home}",
    "distill teach": "teach --out {home} --minutes 0 --vae-steps 0",
    "distill importance": "importance --model {model} --cache {home}/none --student mini-vega --out {home}",
    "distill ablate": "ablate --teacher {model} --out {home} --results {home}/none",
    "distill ablate, its tables": "ablate --teacher {model} --out {home}/none --results {home}",
    "distill bench": "bench --out {home}/numbers.json",
    "bench run": "run --contestants a=fake:denoise=1 --seconds 0 --out {home}/numbers.json",
    "bench run, what is unfinished": "run --contestants a=fake:denoise=1 --seconds 0 --out {home}/fresh.json",
    "bench report": "report --results {home}/none.json --out {home}",
    "bench study make": "study make --models a=fake: b=fake: --count 1 --device cpu --out {home}",
    "bench study serve": "study serve --study {home} --votes {home}/photo.jpg",
    "bench study tally": "study tally --key {home}/none.json --votes {home}/none.json --out {home}",
    "bench gpu": "gpu --models mini-ssd-1b,mini-vega --resolutions 128x128 --device cpu --minutes 0 --out {home}",
}


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.engines.toys import make_toy_onnx

    return make_toy_onnx(tmp_path_factory.mktemp("safety") / "onnx")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, onnx: Path) -> Path:
    from engines.building.build import build_bundle

    out = tmp_path_factory.mktemp("safety") / "bundle"
    build_bundle(onnx, out, gpus=[], flavor="onnxruntime")
    return out


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "home"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, list[str]], int]:
    """The exit code of a room's command, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run_room(room: str, arguments: list[str]) -> int:
        monkeypatch.setattr("sys.argv", [room, *arguments])
        try:
            return int(importlib.import_module(f"{room}.__main__").main())
        except SystemExit as end:  # of what an option cannot be, by its type
            return int(end.code or 0)

    return run_room


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", WRITERS)
def test_nobodys_files_are_touched(
    name: str,
    home: Path,
    onnx: Path,
    bundle: Path,
    mini_vega: Path,
    run: Callable[[str, list[str]], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"home": home, "onnx": onnx, "bundle": bundle, "model": mini_vega}
    before = [content(place) for place in places.values()]
    assert run(name.split(" ", maxsplit=1)[0], WRITERS[name].format(**places).split()) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1, told
    assert [content(place) for place in places.values()] == before


DIGITS = "9" * 5000
"""More than Python reads as a number."""
FAKE = "bench run --out {home}/new.json --contestants a=fake:denoise=1"
BUILD = "engines build --flavor onnxruntime --onnx {onnx} --out {home}/new"
LOAD = "engines load-test --out {home}/new.json --server 127.0.0.1:1"
HOSTILE = {
    **{
        f"{command} with an empty {option}": [*command.split(), option, ""]
        for command, option in (
            ("engines build --onnx x", "--out"),
            ("engines build --out x", "--onnx"),
            ("engines triton --out x", "--bundle"),
            ("engines triton --bundle x", "--out"),
            ("engines load-test", "--out"),
            ("export onnx --model mini:sdxl", "--out"),
            ("export bench --model mini:sdxl", "--out"),
            ("export onnx --out {home}/new", "--model"),
            ("distill cache --data shapes:2", "--out"),
            ("distill cache --out {home}/new", "--data"),
            ("distill train --recipe mini-vega --out x", "--cache"),
            ("distill train --recipe mini-vega --cache x", "--out"),
            ("distill surgery --model mini:sdxl --student mini-vega", "--out"),
            ("distill fetch", "--model"),
            ("bench run --contestants a=fake:denoise=1", "--out"),
            ("bench report --out x", "--results"),
            ("bench gpu --device cpu", "--out"),
            ("bench study make --models a=fake: b=fake:", "--out"),
            ("bench study serve", "--study"),
            ("bench study tally --key x --votes x", "--out"),
        )
    },
    "memory, infinite": [*BUILD.split(), "--memory-gb", "inf"],
    "memory, NaN": [*BUILD.split(), "--memory-gb", "nan"],
    "memory, negative": [*BUILD.split(), "--memory-gb", "-1"],
    "memory, beyond any": [*BUILD.split(), "--memory-gb", "1e300"],
    "memory of a recipe": ["distill", "memory", "--recipe", "mini-vega", "--memory-gb", "inf"],
    "links in a circle": [*BUILD.split()[:-1], "{home}/circle"],
    "batches, ²": [*BUILD.split(), "--batches", "²"],
    "batches, 0": [*BUILD.split(), "--batches", "0"],
    "batches, too many digits": [*BUILD.split(), "--batches", DIGITS],
    "sizes, ²": [*BUILD.split(), "--resolutions", "²x²"],
    "sizes, too many digits": [*BUILD.split(), "--resolutions", f"{DIGITS}x8"],
    "instances, beyond any": [
        "engines",
        "triton",
        "--bundle",
        "{bundle}",
        "--out",
        "{home}/new",
        "--instances",
        "99999999",
    ],
    "port, too many digits": ["engines", "load-test", "--out", "{home}/new.json", "--server", f"h:{DIGITS}"],
    "load, steps 0": [*LOAD.split(), "--steps", "0"],
    "load, guidance NaN": [*LOAD.split(), "--guidance", "nan"],
    "load, minutes negative": [*LOAD.split(), "--minutes", "-1"],
    "load, rate Infinity": [*LOAD.split(), "--rate", "Infinity"],
    "bench, steps ²": [*FAKE.split(), "--steps", "²"],
    "bench, guidance NaN": [*FAKE.split(), "--guidance", "NaN"],
    "bench, seconds inf": [*FAKE.split(), "--seconds", "inf"],
    "bench, seed of too many digits": [*FAKE.split(), "--seed", DIGITS],
    "bench, energy NaN": [*FAKE.split(), "--energy-seconds", "nan"],
    "bench, a delay of infinity": ["bench", "run", "--out", "{home}/new.json", "--contestants", "a=fake:denoise=inf"],
    "bench, minutes NaN": ["bench", "gpu", "--out", "{home}/new", "--device", "cpu", "--minutes", "nan"],
    "tolerance, NaN": ["bench", "compare", "x", "y", "--tolerance", "nan"],
    "a student's folder for an ONNX folder": [
        "engines",
        "build",
        "--onnx",
        "{home}",
        "--out",
        "{home}/new",
        "--gpus",
        "a100",
    ],
    "JSON too deep": ["bench", "report", "--results", "{home}/deep.json", "--out", "{home}/new"],
    "JSON with a number too long": ["bench", "report", "--results", "{home}/long.json", "--out", "{home}/new"],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_input_ends_in_a_traceback(
    name: str,
    home: Path,
    onnx: Path,
    bundle: Path,
    mini_vega: Path,
    run: Callable[[str, list[str]], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What an option cannot be by its type is told by the command line's own box, all else in one line."""
    (home / "circle").symlink_to("circle")
    (home / "deep.json").write_text("[" * 200_000)
    (home / "long.json").write_text(f'{{"schema_version": {DIGITS}}}')
    before = content(home)
    room, *words = (word.format(home=home, onnx=onnx, bundle=bundle, model=mini_vega) for word in HOSTILE[name])
    assert run(room, words) == 2
    told = capsys.readouterr()
    assert (told.err.startswith("error: ") and told.err.count("\n") == 1) or "rror" in told.out + told.err
    assert len(told.err) < 3000 and content(home) == before
