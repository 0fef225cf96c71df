from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from distill.common.errors import UserError
from distill.models.resolution import Resolution
from export.checks.parity import Parity
from export.checks.verify import verify_folder
from export.components import TensorSpec
from export.graph.wrappers import example


def passes(precision: str, relative: float, cosine: float) -> bool:
    about = {"output": "y", "resolution": "1", "largest": 0.0, "seed": 0}
    return Parity(precision=precision, relative=relative, cosine=cosine, **about).passed


def test_bounds_tell_right_from_wrong_and_nan() -> None:
    assert passes("fp32", 5e-6, 1.0) and not passes("fp32", 5e-3, 1.0)
    assert passes("fp16", 5e-3, 0.99999) and not passes("fp16", 5e-3, 0.99)
    assert not passes("fp16", float("nan"), 1.0) and not passes("fp16", 5e-3, float("nan"))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_component_agrees_in_every_resolution(
    precision: str, mini_vega: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"onnx_{precision}")
    results = verify_folder(folder, mini_vega, batch=3)
    assert set(results) == {"unet", "vae_decoder", "vae_encoder", "text_encoder", "text_encoder_2"}
    assert len({row.resolution for row in results["unet"]}) == 9
    for name, rows in results.items():
        assert {row.precision for row in rows} == {"fp32" if name.startswith("vae") else precision}
        assert all(row.passed for row in rows), name
    assert max(row.relative for row in results["unet"]) < (5e-6 if precision == "fp32" else 3e-3)


def test_a_wrong_graph_loses_its_name(mini_vega: Path, onnx_fp32: Path, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    folder.mkdir()
    shutil.copyfile(onnx_fp32 / "slimxl.json", folder / "slimxl.json")
    shutil.copytree(onnx_fp32 / "vae_decoder", folder / "vae_decoder")
    file = folder / "vae_decoder" / "model.onnx"
    model = onnx.load(file)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("conv_out.weight"))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
    onnx.save(model, file)
    for _ in range(2):  # the second takes the place of the first
        results = verify_folder(folder, mini_vega, sizes=[Resolution(128, 96)])
        assert not any(row.passed for row in results["vae_decoder"])
        assert (folder / "vae_decoder.failed").is_dir() and not (folder / "vae_decoder").exists()
        with pytest.raises(UserError, match=r"has no vae_decoder: it disagreed .* export it again"):
            verify_folder(folder, mini_vega)
        shutil.copytree(folder / "vae_decoder.failed", folder / "vae_decoder")
    shutil.rmtree(folder / "vae_decoder")
    shutil.rmtree(folder / "vae_decoder.failed")
    with pytest.raises(UserError, match="holds no component to compare"):
        verify_folder(folder, mini_vega)


def test_inputs_are_drawn_where_graphs_go_wrong() -> None:
    """At large timesteps and picture sizes, whose sinusoids fp16 gets wrong, and with the end of text anywhere."""
    draw = torch.Generator().manual_seed(0)
    [timestep] = example(TensorSpec("timestep", "float32", (1, 1000), (None,) * 2), {}, draw)
    assert 0 <= timestep.min() < 10 and 990 < timestep.max() < 1000
    sizes = example(TensorSpec("time_ids", "float32", (100, 6), (None,) * 2), {}, draw)
    assert 1900 < sizes.max() <= 2048 and (sizes == sizes.round()).all()
    for stated, end in ((300, 300), (2, 999)):  # 2 is what SDXL's own configs say, and means the highest id
        config = {"vocab_size": 1000, "eos_token_id": stated}
        ids = example(TensorSpec("input_ids", "int64", (50, 77), (None,) * 2), config, draw)
        places = (ids == end).int().argmax(dim=1)
        assert (ids == end).any(dim=1).all() and ids.max() < 1000 and len(places.unique()) > 25


def test_a_batch_of_nothing_is_refused(onnx_fp32: Path, mini_vega: Path) -> None:
    with pytest.raises(UserError, match="--batch is 0; the least is 1"):
        verify_folder(onnx_fp32, mini_vega, batch=0)


def test_another_checkpoint_is_refused(onnx_fp32: Path, mini_sdxl: Path) -> None:
    with pytest.raises(UserError, match=r"made from random:mini-vega.*--model"):
        verify_folder(onnx_fp32, mini_sdxl)


@pytest.mark.parametrize("about", [None, "{}"])
def test_a_checkpoint_is_no_onnx_folder(about: str | None, mini_vega: Path, tmp_path: Path) -> None:
    """Not where it has a slimxl.json either, as a student."""
    if about:
        (tmp_path / "slimxl.json").write_text(about)
    with pytest.raises(UserError, match="is no ONNX folder that python -m export onnx has finished"):
        verify_folder(tmp_path, mini_vega)


def test_an_absent_component_is_named(onnx_fp32: Path, mini_vega: Path) -> None:
    with pytest.raises(UserError, match=r"unknown component of this folder 'unit'.*unet"):
        verify_folder(onnx_fp32, mini_vega, components=["unit"])
