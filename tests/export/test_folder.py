from __future__ import annotations

import json
import shutil
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from polygraphy.tools import main as polygraphy
from safetensors.torch import load_file, save_file

import export.folder
import export.write
from distill.checkpoints.folder import file_hashes
from distill.checkpoints.load import load_component
from distill.common.errors import UserError
from distill.common.files import exclusive, read_json, sha256_file
from distill.models.catalogue import count_parameters
from distill.models.families import MINI_FAMILY
from distill.models.networks import CONTROLNETS
from distill.models.resolution import Resolution
from export.checks.parity import cpu_session
from export.components import COMPONENTS
from export.folder import check_files, export_checkpoint
from export.graph.trace import trace
from export.job import ExportOptions, make_job

SMALL = ("text_encoder",)


MADE = [name for name in COMPONENTS if name not in CONTROLNETS]


def written(out: Path) -> list[str]:
    """What an export left in a folder, but for its lock."""
    return sorted(path.name for path in out.iterdir() if path.name != ".lock")


def test_the_layout_is_optimums(onnx_fp32: Path) -> None:
    for name in MADE:
        files = {path.name for path in (onnx_fp32 / name).iterdir()}
        assert files == {"model.onnx", "model.onnx.data", "config.json", "export.json"}
    for part in (
        "tokenizer/vocab.json",
        "tokenizer_2/vocab.json",
        "scheduler/scheduler_config.json",
        "model_index.json",
    ):
        assert (onnx_fp32 / part).is_file()
    assert [path.name for path in onnx_fp32.glob(".*")] == [".lock"]


@pytest.mark.parametrize("name", MADE)
def test_readers_accept_every_file(
    onnx_fp32: Path,
    onnx_fp16: Path,
    name: str,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for folder in (onnx_fp32, onnx_fp16):
        file = folder / name / "model.onnx"
        onnx.checker.check_model(str(file), full_check=True)
        monkeypatch.setattr(sys, "argv", ["polygraphy", "inspect", "model", str(file)])
        assert not polygraphy()
        assert "Opset: 23" in "".join(capfd.readouterr())


def test_metadata_says_what_is_there(onnx_fp16: Path, mini_vega: Path) -> None:
    about = read_json(onnx_fp16 / "slimxl.json")
    assert about["resolutions"] == [str(resolution) for resolution in MINI_FAMILY.resolutions]
    assert (about["precision"], about["vae"]["precision"], about["opset"]) == ("fp16", "fp32", 23)
    assert {"torch", "diffusers", "onnx", "transformers"} <= set(about["versions"])
    unet = read_json(onnx_fp16 / "unet" / "export.json")
    for name, digest in unet["sha256"].items():
        assert sha256_file(onnx_fp16 / "unet" / name) == digest
    assert set(unet["sha256"]) == {"model.onnx", "model.onnx.data", "config.json"}
    assert unet["parameters"] == count_parameters(load_component(mini_vega, "unet", torch.float32))
    assert unet["parameters"] * 2 <= (onnx_fp16 / "unet" / "model.onnx.data").stat().st_size * 1.02
    halves = [read_json(onnx_fp16 / half / "export.json")["parameters"] for half in ("vae_decoder", "vae_encoder")]
    assert sum(halves) == count_parameters(load_component(mini_vega, "vae", torch.float32))
    assert unet["flops_per_call"] > 1e8 and unet["seconds"] > 0


def test_a_second_run_does_nothing_and_a_change_does(mini_vega: Path, tmp_path: Path) -> None:
    said: list[str] = []

    def run(options: ExportOptions) -> int:
        export_checkpoint(mini_vega, tmp_path / "out", options=options, progress=said.append)
        return (tmp_path / "out" / "text_encoder" / "model.onnx").stat().st_mtime_ns

    first = run(ExportOptions(components=SMALL))
    assert run(ExportOptions(components=SMALL)) == first and said[-1] == "text_encoder: up to date"
    second = run(ExportOptions(components=SMALL, precision="fp32", check=False))
    assert second != first and not read_json(tmp_path / "out" / "text_encoder" / "export.json")["checked"]
    third = run(ExportOptions(components=SMALL, precision="fp32"))  # compared now
    assert third != second and read_json(tmp_path / "out" / "text_encoder" / "export.json")["checked"]
    (tmp_path / "out" / "text_encoder" / "model.onnx.data").write_bytes(b"cut off")
    assert run(ExportOptions(components=SMALL, precision="fp32")) != third


def test_exports_into_one_folder_take_turns_and_touch_nothing_beside_it(
    mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    out = tmp_path / "out"
    (out / ".unet.0a1b2c3d.partial").mkdir(parents=True)  # of an export that was killed
    monkeypatch.chdir(out)

    def export() -> None:
        export_checkpoint(mini_vega, Path(), options=ExportOptions(components=SMALL), progress=said.append)

    with ThreadPoolExecutor() as pool:
        with exclusive(out, lock_file=out / ".lock"):
            second = pool.submit(export)
            while not said:
                time.sleep(0.01)
            assert said == ["another process is writing .; waiting for it"] and not second.done()
        second.result()
    assert (out / "slimxl.json").is_file() and [path.name for path in out.glob(".*")] == [".lock"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_checkpoint_is_not_exported_over_itself(mini_vega: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(mini_vega, tmp_path / "checkpoint")
    (checkpoint / "slimxl.json").write_text("{}")  # as a student has
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UserError, match=r"checkpoint is not an ONNX folder of slimxl: it holds .* nothing was touched"):
        export_checkpoint(checkpoint, checkpoint, options=ExportOptions(components=SMALL))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("file", ["notes.txt", "scheduler/scheduler_config.json", "model_index.json", "slimxl.json"])
def test_a_folder_that_no_export_made_is_not_touched(mini_vega: Path, file: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / file).parent.mkdir(parents=True)
    (out / file).write_text("{}")
    with pytest.raises(UserError, match="is not an ONNX folder of slimxl: it holds"):
        export_checkpoint(mini_vega, out, options=ExportOptions(components=SMALL))
    assert [path for path in out.rglob("*") if path.is_file()] == [out / file]


@pytest.mark.parametrize(
    "file", ["text_encoder/model.onnx.data", "text_encoder/config.json", "tokenizer/merges.txt", "model_index.json"]
)
def test_a_flipped_byte_is_named(mini_vega: Path, onnx_fp32: Path, file: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(onnx_fp32, tmp_path / "onnx"))
    check_files(folder)
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file).write_bytes(data)
    with pytest.raises(UserError, match=f"{file} has changed since it was exported"):
        check_files(folder)
    check_files(folder, ["unet"])
    if file.endswith(".data"):
        options = ExportOptions(components=SMALL, precision="fp32", reuse=(folder,))
        with pytest.raises(UserError, match=f"{file} has changed"):
            export_checkpoint(mini_vega, tmp_path / "out", options=options)
    (folder / file).unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        check_files(folder)


HASHED = {"bytes": {"model.onnx": 1}, "sha256": {"model.onnx": "0"}}
RECORDS = [
    json.dumps(record)
    for record in (
        {"bytes": {}, "sha256": {}},
        {**HASHED, "graphs": ["a"]},
        {**HASHED, "graphs": {"128x128": 3}},
        {**HASHED, "graphs": {"128x128": "../x.onnx"}},
    )
]


@pytest.mark.parametrize(
    "text", ["[]", "null", "{}", '{"bytes": 3}', '{"bytes": {}, "sha256": {"../x": "y"}}', "{", *RECORDS]
)
def test_a_damaged_record_is_one_line(mini_vega: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "text_encoder").mkdir(parents=True)
    (out / "text_encoder" / "export.json").write_text(text)
    (out / "slimxl.json").write_text(json.dumps({"opset": 23, "versions": {}}))  # else it is nobody's ONNX folder
    for call in (check_files, lambda out: export_checkpoint(mini_vega, out, options=ExportOptions(components=SMALL))):
        with pytest.raises(UserError, match=r"export\.json"):
            call(out)


def test_a_scheduler_that_cannot_load_is_refused_at_export(mini_vega: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(mini_vega, tmp_path / "checkpoint"))
    index = read_json(checkpoint / "model_index.json") | {"scheduler": ["diffusers", "NoSuchScheduler"]}
    (checkpoint / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"scheduler is .*NoSuchScheduler"):
        export_checkpoint(checkpoint, tmp_path / "out", options=ExportOptions(components=SMALL))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("precision", "value"), [("fp32", 2.0), ("fp16", 1.0)])
def test_the_file_named_fp16_is_read_for_fp16_alone(
    mini_vega: Path, precision: str, value: float, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(mini_vega, tmp_path / "checkpoint"))
    plain = checkpoint / "text_encoder" / "model.safetensors"
    tensors, key = load_file(plain), "text_model.final_layer_norm.bias"
    for name, number in (("model.safetensors", 2.0), ("model.fp16.safetensors", 1.0)):
        save_file(tensors | {key: torch.full_like(tensors[key], number)}, plain.with_name(name), {"format": "pt"})
    said: list[str] = []
    options = ExportOptions(components=SMALL, precision=precision)
    export_checkpoint(checkpoint, tmp_path / "out", options=options, progress=said.append)
    model = ir.load(tmp_path / "out" / "text_encoder" / "model.onnx")
    [bias] = [v for name, v in model.graph.initializers.items() if name.endswith("final_layer_norm.bias")]
    assert (bias.const_value.numpy() == value).all()
    read = {"fp32": "model.safetensors", "fp16": "model.fp16.safetensors"}[precision]
    assert any(f"text_encoder: {precision} from {read}," in line for line in said)


def test_a_folder_is_not_whole_while_components_are_copied_into_it(
    mini_vega: Path, onnx_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copytree(*_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copytree", copytree)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "slimxl.json").write_text(json.dumps({"source": {}, "opset": 23, "versions": {}}))
    options = ExportOptions(components=SMALL, precision="fp32", reuse=(onnx_fp32,))
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(mini_vega, tmp_path / "out", options=options)
    assert not written(tmp_path / "out")


def test_components_of_two_models_are_not_mixed(mini_vega: Path, tmp_path: Path) -> None:
    def run(**options: Any) -> None:
        export_checkpoint(mini_vega, tmp_path / "out", options=ExportOptions(**options), progress=lambda line: None)

    run(components=SMALL)
    with pytest.raises(UserError, match=r"holds a text_encoder of another checkpoint, precision.*--components"):
        run(components=("text_encoder_2",), precision="fp32")
    assert not (tmp_path / "out" / "text_encoder_2").exists()
    about = read_json(tmp_path / "out" / "text_encoder" / "export.json")
    file = mini_vega / "text_encoder" / "model.safetensors"
    assert about["source_sha256"] == {file.name: sha256_file(file)}


@pytest.mark.parametrize("content", [None, b"", b"no graph"])
def test_a_graph_that_a_runtime_refuses_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(UserError, match=r"ONNX Runtime refuses .*model\.onnx"):
        cpu_session(tmp_path / "model.onnx")


def test_equal_components_are_taken_from_another_folder(onnx_fp16: Path, onnx_fp32: Path) -> None:
    ours, theirs = (read_json(folder / "vae_decoder" / "export.json") for folder in (onnx_fp16, onnx_fp32))
    assert ours == theirs
    assert read_json(onnx_fp16 / "unet" / "export.json")["key"] != read_json(onnx_fp32 / "unet" / "export.json")["key"]


def test_static_graphs_share_one_file_of_weights(mini_vega: Path, onnx_fp32: Path, tmp_path: Path) -> None:
    sizes = (Resolution(128, 128), Resolution(224, 96), Resolution(96, 160))
    options = ExportOptions(components=("unet",), precision="fp32", resolutions=sizes)
    export_checkpoint(mini_vega, tmp_path / "out", options=options)
    folder = tmp_path / "out" / "unet"
    graphs = read_json(folder / "export.json")["graphs"]
    about = read_json(folder / "export.json")
    assert {row["resolution"] for row in about["checked"]} == {
        "1 of 160x128",
        "3 of 160x128",
    }  # small, whatever is exported
    assert [options.rows(name) for name in ("unet", "vae_decoder", "text_encoder")] == [2, 1, 1]  # one guided image
    assert about["inputs"][0]["shape"] == [2, 4, 16, 16]
    assert list(graphs) == [str(size) for size in sorted(sizes, key=str)] and len(list(folder.glob("*.data"))) == 1
    assert (folder / "model.onnx.data").stat().st_size == (onnx_fp32 / "unet" / "model.onnx.data").stat().st_size
    config, rng = read_json(folder / "config.json"), np.random.default_rng(0)
    open_session = onnxruntime.InferenceSession(str(onnx_fp32 / "unet" / "model.onnx"))
    for size in sizes:
        onnx.checker.check_model(str(folder / graphs[str(size)]), full_check=True)
        session = onnxruntime.InferenceSession(str(folder / graphs[str(size)]))
        specs = COMPONENTS["unet"].inputs(config, size, 2, "fp32")
        assert [tuple(value.shape) for value in session.get_inputs()] == [spec.shape for spec in specs]
        kinds = {node.op_type for node in onnx.load(folder / graphs[str(size)], load_external_data=False).graph.node}
        assert "Shape" not in kinds
        feed = {spec.name: np.asarray(rng.standard_normal(spec.shape), np.float32) for spec in specs}
        assert np.abs(session.run(None, feed)[0] - open_session.run(None, feed)[0]).max() < 1e-5


def test_a_graph_that_disagrees_never_gets_its_name(
    mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sabotaged(*arguments: Any) -> ir.Model:
        """As `trace`, with one norm's gain off by a tenth."""
        model = trace(*arguments)
        gain = next(value for name, value in model.graph.initializers.items() if name.endswith("layer_norm1.weight"))
        gain.const_value = ir.tensor(gain.const_value.numpy() * np.float16(1.1), name=gain.name)
        return model

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "slimxl.json").write_text(json.dumps({"source": {}, "opset": 23, "versions": {}}))
    monkeypatch.setattr(export.write, "trace", sabotaged)
    with pytest.raises(UserError, match=r"text_encoder: .*disagrees with torch.*last_hidden_state.*--opset 18"):
        export_checkpoint(mini_vega, tmp_path / "out", options=ExportOptions(components=SMALL))
    assert not written(tmp_path / "out")


def copied(checkpoint: Path, folder: Path, drop: str) -> Path:
    shutil.copytree(checkpoint, folder)
    file = folder / "text_encoder" / "model.safetensors"
    save_file(
        {key: value for key, value in load_file(file).items() if drop not in key}, file, metadata={"format": "pt"}
    )
    return folder


def test_missing_weights_are_named(mini_vega: Path, tmp_path: Path) -> None:
    broken = copied(mini_vega, tmp_path / "broken", "layers.1.mlp.fc1.bias")
    with pytest.raises(UserError, match=r"lacks 1 of \d+ weights.*layers\.1\.mlp\.fc1\.bias"):
        export_checkpoint(broken, tmp_path / "out", options=ExportOptions(components=SMALL))
    assert not written(tmp_path / "out")


def test_weights_of_another_shape_are_named(mini_vega: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(mini_vega, wrong)
    config = json.loads((wrong / "text_encoder" / "config.json").read_text())
    (wrong / "text_encoder" / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    with pytest.raises(UserError, match="has shape"):
        export_checkpoint(wrong, tmp_path / "out", options=ExportOptions(components=SMALL))


def test_a_full_disk_is_seen_before_writing(mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    with pytest.raises(UserError, match=r"needs .* MB .*free some space"):
        export_checkpoint(mini_vega, tmp_path / "out", options=ExportOptions(components=SMALL))
    assert not written(tmp_path / "out")


@pytest.mark.parametrize(("precision", "bytes_each"), [("fp16", 2), ("fp32", 4)])
def test_the_disk_wanted_is_that_of_the_weights(
    mini_vega: Path, precision: str, bytes_each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever type they are stored in, and of the VAE each half once."""
    monkeypatch.setattr(export.folder, "require_free_disk", lambda _, needed, __: needs.append(needed))
    needs: list[int] = []
    options = ExportOptions(components=("vae_decoder", "vae_encoder"), vae_precision=precision)
    jobs = [make_job(mini_vega, name, options, file_hashes(mini_vega)) for name in options.components]
    export.folder._check_free_disk(jobs, mini_vega)
    assert needs == [50_000_000 + bytes_each * count_parameters(load_component(mini_vega, "vae", torch.float32))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 17}, "opset 17.*allowed are 18, 19, 20, 21, 22, 23"),
        ({"batch": 0}, "--batch is 0; the least is 1"),
        ({"guidance": "any"}, "unknown guidance 'any'"),
        ({"components": ()}, "no component is named: known are unet"),
        ({"components": ("unit",)}, "unknown component 'unit'.*did you mean 'unet'"),
        ({"precision": "int8"}, "unknown precision 'int8'"),
        ({"vae_precision": "int8"}, "unknown VAE precision"),
    ],
)
def test_unknown_options_list_the_known(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ExportOptions(**options)


def test_a_size_the_model_cannot_take_writes_nothing(mini_vega: Path, tmp_path: Path) -> None:
    options = ExportOptions(resolutions=(Resolution(128, 128), Resolution(120, 128)))
    with pytest.raises(UserError, match=r"120x128.*multiples of 32"):
        export_checkpoint(mini_vega, tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()
