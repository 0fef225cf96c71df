"""A UNet in 8 bits: the graph computes what torch computes with the same rounding, and bad input changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from distill.checkpoints.load import load_component
from distill.common.errors import UserError
from distill.common.files import read_json
from distill.models.resolution import Resolution
from engines.building.process import run_worker
from engines.building.progress import BuildProgress
from engines.bundle import Profile, ShapeRange
from engines.flavors import BuildRequest
from export.__main__ import main
from export.checks.verify import verify_folder
from export.components import COMPONENTS
from export.graph.wrappers import example, wrap
from export.prompts import some_text
from export.quantise import calibrate as room
from export.quantise import judge as room_of_judge
from export.quantise.calibrate import Drawing, calibrate
from export.quantise.fake import rounded
from export.quantise.folder import QuantiseOptions, check_source, find_ranges, prepare_source, quantise_folder
from export.quantise.graph import write_pairs
from export.quantise.judge import judge_folders, table
from export.quantise.layers import PRECISIONS, find_layers, is_kept
from export.quantise.ranges import Ranges, percentiles_of, write_ranges
from export.quantise.scales import find_scales
from export.quantise.sensitivity import find_sensitivity, largest_row, write_sensitivity

DRAWING = Drawing(prompts=("a", "b", "c", "d"), resolutions=(Resolution(128, 128), Resolution(96, 160)), steps=1)


@pytest.fixture(scope="session")
def ranges_of(
    mini_vega: Path, workdir: Path, onnx_fp32: Path, onnx_fp16: Path
) -> Callable[[str], tuple[Path, Path, Ranges]]:
    """The folder, the checkpoint and the ranges for a precision."""

    def find(precision: str) -> tuple[Path, Path, Ranges]:
        folder = onnx_fp32 if precision == "int8" else onnx_fp16
        record = json.loads((folder / "unet" / "export.json").read_text())
        return folder, mini_vega, find_ranges(mini_vega, record, DRAWING, workdir, "cpu")

    return find


@pytest.fixture(scope="session")
def quantised(
    ranges_of: Callable[[str], tuple[Path, Path, Ranges]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    found = {}
    for precision in PRECISIONS:
        folder, checkpoint, ranges = ranges_of(precision)
        found[precision] = tmp_path_factory.mktemp("quantised") / precision
        quantise_folder(folder, found[precision], checkpoint, ranges, QuantiseOptions(precision=precision))
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_graph_rounds_as_torch_does_with_the_same_scales(
    precision: str, ranges_of: Callable[[str], tuple[Path, Path, Ranges]], tmp_path: Path
) -> None:
    """Layers that do not follow one another, since each value that falls on the other side of one rounding makes others
    fall in the next. ONNX Runtime has no fused kernels for fp8, so it takes the pairs as they are."""
    folder, checkpoint, ranges = ranges_of("int8")
    config, text = read_json(folder / "unet" / "config.json"), some_text(checkpoint)
    specs = COMPONENTS["unet"].inputs(config, Resolution(128, 128), 2, "fp32")
    generator = torch.Generator().manual_seed(1)
    inputs = [text[spec.name][:2] if spec.name in text else example(spec, config, generator) for spec in specs]
    feeds = {spec.name: value.numpy() for spec, value in zip(specs, inputs, strict=True)}
    network: Any = wrap("unet", load_component(checkpoint, "unet", torch.float32))
    block, own = "up_blocks.1.attentions.2.transformer_blocks.0", PRECISIONS[precision]
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    with torch.no_grad():
        [exact] = network(*inputs)
    for names in ([f"{block}.attn1.{part}" for part in ("to_q", "to_k", "to_v")], ["up_blocks.2.resnets.2.conv2"]):
        model = ir.load(folder / "unet" / "model.onnx")
        layers = [layer for layer in find_layers(model.graph) if layer.name in names]
        assert sorted(layer.name for layer in layers) == sorted(names)
        scales = find_scales(layers, ranges, own, own.alpha, own.percentile)
        write_pairs(model, layers, scales, own)
        ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
        [got] = onnxruntime.InferenceSession(tmp_path / "model.onnx", options).run(None, feeds)
        with torch.no_grad(), rounded(network.unet, scales, names, own):
            [expected] = network(*inputs)
        assert _off(got, expected) < _off(expected, exact) / 10
    with torch.no_grad():
        assert torch.equal(network(*inputs)[0], exact), "the network is as it was"


def _off(one: Any, other: Any) -> float:
    return float(np.linalg.norm(np.float64(one) - np.float64(other)) / np.linalg.norm(np.float64(other)))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_folder_is_as_any_other(
    precision: str, quantised: dict[str, Path], ranges_of: Callable[[str], tuple[Path, Path, Ranges]]
) -> None:
    out = quantised[precision]
    folder, checkpoint, ranges = ranges_of(precision)
    results = verify_folder(out, checkpoint, components=["unet"], sizes=[Resolution(224, 96)])
    assert [row.precision for row in results["unet"]] == [precision] and all(row.passed for row in results["unet"])
    for name in ("vae_decoder/model.onnx.data", "tokenizer/vocab.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
        assert (out / name).stat().st_nlink == 1
    before, after = (read_json(one / "unet" / "export.json") for one in (folder, out))
    assert after["quantised"]["precision"] == precision and after["precision"] == before["precision"]
    data = "model.onnx.data"
    assert after["bytes"][data] < before["bytes"][data] * (0.45 if before["precision"] == "fp32" else 0.7)
    said: list[str] = []
    quantise_folder(folder, out, checkpoint, ranges, QuantiseOptions(precision=precision), progress=said.append)
    assert said == [f"unet: {precision}, up to date"]


@pytest.mark.parametrize(("precision", "capabilities"), [("int8", ["8.0", "8.9"]), ("fp8", ["8.9"])])
def test_tensorrt_rtx_builds_a_plan_of_it(
    precision: str,
    capabilities: list[str],
    ranges_of: Callable[[str], tuple[Path, Path, Ranges]],
    tmp_path: Path,
) -> None:
    """Of the first ResNet and transformer block, which have every kind of layer: the whole takes a minute."""
    folder, _, ranges = ranges_of("fp8")
    config, own = read_json(folder / "unet" / "config.json"), PRECISIONS[precision]
    last = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"
    [end] = [layer for layer in find_layers(ir.load(folder / "unet" / "model.onnx").graph) if layer.name == last]
    output = str(end.node.outputs[0].name)
    specs = COMPONENTS["unet"].inputs(config, Resolution(128, 128), 2, "fp16")
    names = [spec.name for spec in specs]
    onnx.utils.extract_model(folder / "unet" / "model.onnx", tmp_path / "part.onnx", names, [output], check_model=False)
    model = ir.load(tmp_path / "part.onnx")
    layers = find_layers(model.graph)
    assert {layer.node.op_type for layer in layers} == {"Conv", "MatMul"} and layers[-1].name == last
    write_pairs(model, layers, find_scales(layers, ranges, own, own.alpha, own.percentile), own)
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    shapes = {spec.name: ShapeRange(min=list(spec.shape), opt=list(spec.shape), max=list(spec.shape)) for spec in specs}
    request = BuildRequest(
        component="unet",
        flavor="tensorrt-rtx",
        onnx_files=[tmp_path / "model.onnx", tmp_path / "model.onnx.data"],
        out=tmp_path / "unet.plan",
        profiles=[Profile(index=0, resolutions=["128x128"], batch=1, shapes=shapes)],
        outputs=[output],
        compute_capabilities=capabilities,
    )
    with BuildProgress(
        [1.0]
    ) as progress:  # in a process of its own: a process is of one TensorRT, by what it imports first
        progress.start("unet")
        [found] = run_worker(request, 4 << 30, progress)["outputs"]
    assert (found["name"], found["dtype"]) == (output, "float16") and request.out.stat().st_size > 100_000


def test_what_stays_in_half_precision(quantised: dict[str, Path]) -> None:
    graph = onnx.load(quantised["int8"] / "unet" / "model.onnx", load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    for kept in ("conv_in", "conv_out", "time_embedding.linear_1", "down_blocks.1.attentions.0.proj_out"):
        assert is_kept(kept) and f"unet.{kept}.weight" in weights
    low = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert not is_kept(low) and f"unet.{low}.weight_int8" in weights and f"unet.{low}.weight" not in weights
    inputs = [node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(inputs) == len(set(inputs)), "q, k and v round their common input once"


def test_an_interrupted_calibration_goes_on_and_a_finished_one_draws_nothing(
    mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = calibrate(mini_vega, "0" * 64, DRAWING, tmp_path / "whole")
    save = room.Watch.save

    def killed(watch: room.Watch, path: Path, done: int) -> None:
        save(watch, path, done)
        if done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(room.Watch, "save", killed)
        calibrate(mini_vega, "0" * 64, DRAWING, tmp_path / "parts")
    assert calibrate(mini_vega, "0" * 64, DRAWING, tmp_path / "parts") == whole
    monkeypatch.setattr(room, "load_pipeline", lambda *_: pytest.fail("drawn again"))
    assert calibrate(mini_vega, "0" * 64, DRAWING, tmp_path / "parts") == whole
    assert [path.suffix for path in (tmp_path / "parts").glob("ranges*")] == [".json"]


def test_a_network_that_makes_nan_is_told_at_once_and_nothing_is_kept(
    mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = room.load_pipeline

    def poisoned(*about: Any, **named: Any) -> Any:
        pipe = load(*about, **named)
        pipe.unet.conv_in.bias.data[0] = float("nan")
        return pipe

    monkeypatch.setattr(room, "load_pipeline", poisoned)
    with pytest.raises(UserError, match=r"down_blocks.0.resnets.0.conv1 was given numbers that are NaN"):
        calibrate(mini_vega, "0" * 64, DRAWING, tmp_path)
    assert not list(tmp_path.glob("ranges*"))


def test_a_range_beyond_fp16_is_told_by_its_layer(
    ranges_of: Callable[[str], tuple[Path, Path, Ranges]],
) -> None:
    folder, _, ranges = ranges_of("fp8")
    [layer, *_] = find_layers(ir.load(folder / "unet" / "model.onnx").graph)
    one = ranges.layers[layer.name]
    huge = replace(ranges, layers={layer.name: replace(one, percentiles=[1e9] * 5)})
    with pytest.raises(UserError, match=f"no float16 holds the scale; .*--keep {layer.name}"):
        find_scales([layer], huge, PRECISIONS["int8"], 0.8, 100.0)


def test_percentiles_are_read_from_a_histogram_of_octaves() -> None:
    rng = np.random.default_rng(0)
    values = np.abs(rng.standard_normal(1_000_000)) * 3
    bins = ((np.log2(np.maximum(values, 2.0**-24)) + 24) * 32).astype(int)
    found = percentiles_of(np.bincount(bins, minlength=1280), float(values.max()))
    exact = [np.percentile(values, one) for one in (99.0, 99.9, 99.99)]
    assert np.allclose(found[:3], exact, rtol=0.03) and found[-1] == values.max() and sorted(found) == found


def _change(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "unet" / "export.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_bad_input_is_told_before_anything_is_written(
    ranges_of: Callable[[str], tuple[Path, Path, Ranges]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, checkpoint, ranges = ranges_of("int8")
    names = ("out", "few.txt", "nan.json", "other.json", "torn.json")
    out, few, spoilt, other, torn = (tmp_path / name for name in names)
    few.write_text("one\ntwo\n")
    layer = next(iter(ranges.layers))
    write_ranges(spoilt, ranges)
    text = json.loads(spoilt.read_text())
    text["layers"][layer]["percentiles"][0] = -1.0
    spoilt.write_text(json.dumps(text))
    write_ranges(other, replace(ranges, unet_sha256="1" * 64))
    one = ranges.layers[layer]
    write_ranges(
        torn, replace(ranges, layers=ranges.layers | {layer: replace(one, channels=[1e30] * len(one.channels))})
    )
    for words, message in (
        (["--prompts", str(few)], "2 prompt(s) are wanted of 2"),
        (["--count", "3"], "the least is 4"),
        (["--prompts", str(tmp_path / "none.txt")], "is no file"),
        (["--ranges", str(spoilt)], f"the range of {layer} has a number that is none"),
        (["--ranges", str(other)], "the ranges are of another UNet"),
        (["--ranges", str(torn)], f"the channels and percentiles of {layer} contradict each other"),
        (["--percentile", "98"], "--percentile is 98"),
        (["--alpha", "2"], "--alpha is 2"),
        (["--max-error", "0"], "--max-error is 0"),
        (["--precision", "fp8"], "fp8 is made from an fp16 folder"),
        (["--model", "mini:sdxl"], "was made from random:mini-vega"),
        (["--keep", "*"], "is left to quantise"),
    ):
        given = {"--onnx": str(folder), "--model": str(checkpoint), "--precision": "int8", "--out": str(out)}
        given |= {"--workdir": str(tmp_path / "work"), "--count": "4", "--steps": "1", "--resolutions": "128x128"}
        given |= dict(zip(words[::2], words[1::2], strict=True))
        if "--prompts" in words:
            del given["--count"]
        code = _run(given)
        told = capsys.readouterr().err
        assert code == 2 and message in told and told.count("\n") == 1, told
        assert not out.exists() or {path.name for path in out.iterdir()} <= {".lock"}


def _run(options: dict[str, str]) -> int:
    import sys

    before = sys.argv
    sys.argv = ["export", "quantise", *(word for pair in options.items() for word in pair)]
    try:
        return main()
    finally:
        sys.argv = before


def test_folders_that_cannot_be_quantised(
    ranges_of: Callable[[str], tuple[Path, Path, Ranges]], quantised: dict[str, Path], tmp_path: Path
) -> None:
    folder, _, _ = ranges_of("int8")
    options = QuantiseOptions(precision="int8")
    with pytest.raises(UserError, match="is in int8 already"):
        check_source(quantised["int8"], tmp_path / "out", options)
    for change, message in (({"opset": 18}, "8 bits need 19"), ({"graphs": {"128x128": "model.onnx"}}, "each size")):
        copy = tmp_path / message.split()[0]
        shutil.copytree(folder, copy)
        _change(copy, lambda record, change=change: record.update(change))  # type: ignore[misc]
        with pytest.raises(UserError, match=message):
            check_source(copy, tmp_path / "out", options)
    with pytest.raises(UserError, match="choose another --out"):
        check_source(folder, folder, options)
    assert prepare_source(folder, ranges_of("int8")[1], tmp_path).is_dir()


def test_as_many_layers_go_in_as_the_bound_allows(
    ranges_of: Callable[[str], tuple[Path, Path, Ranges]], tmp_path: Path
) -> None:
    folder, checkpoint, ranges = ranges_of("int8")
    recipe = QuantiseOptions(
        precision="int8", keep=("down_blocks.*", "mid_block.*", "up_blocks.0.*", "*.attn?.*")
    ).recipe
    found = find_sensitivity(folder, checkpoint, ranges, DRAWING, recipe, 5e-3, tmp_path)
    values = list(found.errors.values())
    assert values == sorted(values) and 0 < found.low < len(values)
    assert max(values[: found.low]) < found.error <= 5e-3, "together they do more than the worst of them alone"
    assert found.kept == tuple(found.errors)[found.low :]
    write_sensitivity(tmp_path, found)
    assert json.loads((tmp_path / "sensitivity.json").read_text())["low"] == found.low
    assert (tmp_path / "sensitivity.svg").read_text().count("<svg") == 1
    with pytest.raises(UserError, match="no layer stays within it in int8"):
        find_sensitivity(folder, checkpoint, ranges, DRAWING, recipe, 1e-9, tmp_path)


def test_folders_are_judged_beside_the_first(
    quantised: dict[str, Path],
    ranges_of: Callable[[str], tuple[Path, Path, Ranges]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, checkpoint, _ = ranges_of("int8")
    other, draw, drawn = tmp_path / "other", room_of_judge.draw_scenes, []
    shutil.copytree(folder, other)
    _change(other, lambda record: record.update(source_sha256={"diffusion_pytorch_model.safetensors": "0" * 64}))
    monkeypatch.setattr(room_of_judge, "draw_scenes", lambda *about: drawn.append(about[2]) or draw(*about))
    folders, how = [folder, quantised["int8"]], {"count": 9, "steps": 1, "rounds": 1}
    first, low = rows = judge_folders(folders, checkpoint, tmp_path, **how)
    assert first.step_errors == [0.0] and first.psnr_db is None and (first.precision, low.precision) == ("fp32", "int8")
    assert 1e-3 < low.step_errors[0] < 0.2 and low.psnr_db is not None and low.psnr_db[0] <= low.psnr_db[1]
    assert low.unet_bytes < first.unet_bytes / 2 and "| int8 (int8) | 0." in table(rows, 9)
    again = judge_folders(folders, checkpoint, tmp_path, **how)
    assert [row.psnr_db for row in again] == [row.psnr_db for row in rows] and drawn == [9] * 4, "pictures are kept"
    for wrong, told in (([folder], "two folders or more"), ([folder, other], "of another UNet")):
        with pytest.raises(UserError, match=told):
            judge_folders(wrong, checkpoint, tmp_path, **how)


@pytest.mark.parametrize(("bound", "row"), [(0.5, 0), (3.0, 3), (99.0, 7)])
def test_the_row_is_found_by_halving(bound: float, row: int) -> None:
    assert largest_row(7, float, bound) == (row, float(row))
