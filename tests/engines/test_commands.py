"""verify, inspect, list and prune, as commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from engines.__main__ import main
from engines.bundle import Manifest, read_manifest
from engines.integrity import verify_bundle


@pytest.fixture
def bundle(tmp_path: Path, toy_bundle: Path) -> Path:
    shutil.copytree(toy_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr("sys.argv", ["engines", *map(str, arguments)])
    return main()


def test_targets_are_told_before_anything_is_exported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "targets", "--gpus", "a100,rtx4090", "--precision", "int8") == 0
    assert capsys.readouterr().out == "int8 by tensorrt-rtx for a100, rtx4090 (sm80-sm89)\n"
    assert run(monkeypatch, "targets", "--gpus", "rtx4090,a100", "--precision", "fp8") == 2
    assert "a100 has 8.0: take int8 there" in capsys.readouterr().err


def test_verify(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "verify", bundle) == 0
    assert "8 engines, every hash as recorded" in capsys.readouterr().out
    victim = bundle / read_manifest(bundle).engines[4].files[0].path
    victim.write_bytes(victim.read_bytes() + b"x")
    assert run(monkeypatch, "verify", bundle) == 2
    printed = capsys.readouterr().out
    assert "1 fault(s)" in printed and "python -m engines build --onnx ONNX" in printed


def test_a_bundle_without_engines_is_no_sound_one(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"engines": []}))
    assert run(monkeypatch, "verify", bundle) == 2
    assert "holds no engine; build some with: python -m engines build" in capsys.readouterr().out


def test_inspect(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "inspect", bundle) == 0
    printed = capsys.readouterr().out
    for text in ("a100 rtx4090 (8.0 8.9)", "sample [1, 4, 12, 12] to [2, 4, 28, 28]", "in  input_ids: int64"):
        assert text in printed
    assert run(monkeypatch, "inspect", bundle, "--json") == 0
    assert Manifest.model_validate_json(capsys.readouterr().out) == read_manifest(bundle)


def test_list(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken = bundle.parent / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text(json.dumps({"schema_version": 9}))
    assert run(monkeypatch, "list", bundle.parent) == 0
    printed = capsys.readouterr().out
    assert "toy" in printed and "damaged" in printed and "tensorrt-rtx" in printed
    assert run(monkeypatch, "list", bundle / "unet") == 2
    assert "no bundle in" in capsys.readouterr().err


def test_prune(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stray = bundle / "unet" / "unet_128x128_b1_sm80_tensorrt-rtx-1.0_0123abcd.plan"
    stray.write_bytes(b"of a killed build")
    users = [bundle / name for name in ("unet/old.plan", "unet/weights.safetensors", "tokenizer/notes.txt", "a.plan")]
    for path in users:
        path.write_bytes(b"somebody's")
    assert run(monkeypatch, "prune", bundle, "--keep-flavors", "onnxruntime", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert printed.count("would remove") == 5 and f"would remove unet/{stray.name}, which no manifest names" in printed
    assert stray.exists()
    assert len(read_manifest(bundle).engines) == 8
    assert run(monkeypatch, "prune", bundle, "--keep-flavors", "onnxruntime") == 0
    assert "4 engine(s) kept" in (done := capsys.readouterr().out)
    assert done.replace("removed", "would remove") == printed, "a dry run tells it all"
    assert read_manifest(bundle).flavors == ["onnxruntime"] and verify_bundle(bundle) == []
    assert sorted(bundle.rglob("*.plan")) == [users[3], users[0]] and all(path.exists() for path in users)


def test_prune_keeps_what_has_no_size(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    for engine in manifest["engines"]:
        if engine["component"].startswith("text"):  # as older builds left them
            engine["resolutions"] = engine["profiles"][0]["resolutions"] = ["128x128"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert run(monkeypatch, "prune", bundle, "--keep-resolutions", "224x96") == 0
    assert len(read_manifest(bundle).engines) == 8


def test_prune_keeps_what_serves_a_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    for engine in manifest["engines"][4:]:
        engine["options"] = {"hardware_compatible": "ampere+"}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert run(monkeypatch, "prune", bundle, "--keep-gpus", "rtx5090") == 0
    assert len(read_manifest(bundle).engines) == 8


def test_prune_keeps_the_newest_of_two_versions(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    newer = json.loads(json.dumps(manifest["engines"][4])) | {"flavor_version": "99.0", "key": "0" * 64}
    newer["files"][0]["path"] += ".newer"
    shutil.copyfile(bundle / manifest["engines"][4]["files"][0]["path"], bundle / newer["files"][0]["path"])
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"engines": [newer, *manifest["engines"]]}))
    assert run(monkeypatch, "prune", bundle) == 0 and len(read_manifest(bundle).engines) == 9
    assert run(monkeypatch, "prune", bundle, "--keep-newest") == 0
    kept = read_manifest(bundle).engines
    assert len(kept) == 8 and kept[0].key == newer["key"] and verify_bundle(bundle) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--keep-gpus", "rtx9999"], "unknown GPU"),
        (["--keep-flavors", "tpu"], "unknown flavor"),
        (["--keep-resolutions", "1x1"], "unknown resolution"),
        (["--keep-flavors", "tensorrt"], "would leave no engine"),
    ],
)
def test_prune_refuses(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert run(monkeypatch, "prune", bundle, *arguments) == 2
    assert message in capsys.readouterr().err
    assert len(read_manifest(bundle).engines) == 8
