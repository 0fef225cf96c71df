from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses import FakeTensor

from distill.checkpoints.load import load_component
from distill.checkpoints.tensors import component_weights
from distill.common.errors import UserError
from export.folder import export_checkpoint
from export.graph.weights import load_shapes
from export.job import ExportOptions


def rewritten(checkpoint: Path, component: str, out: Path, change) -> Path:
    """A copy of `checkpoint` whose tensors of one component are what `change` makes of them."""
    shutil.copytree(checkpoint, out)
    [file] = component_weights(out / component)
    save_file(change(load_file(file)), file, {"format": "pt"})
    return out


def test_no_weight_is_read_to_make_a_graph(mini_vega: Path) -> None:
    network = load_shapes(mini_vega, "unet", torch.float16)
    real = load_component(mini_vega, "unet", torch.float16)
    assert all(isinstance(parameter.data, FakeTensor) for parameter in network.parameters())
    shapes = {name: (parameter.shape, parameter.dtype) for name, parameter in network.named_parameters()}
    assert shapes == {name: (parameter.shape, parameter.dtype) for name, parameter in real.named_parameters()}


def old_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A VAE as diffusers called its attention until 0.17."""
    renamed = {}
    for key, tensor in tensors.items():
        for new, old in (
            (".to_q.", ".query."),
            (".to_k.", ".key."),
            (".to_v.", ".value."),
            (".to_out.0.", ".proj_attn."),
        ):
            key = key.replace(new, old)
        renamed[key] = tensor
    return renamed


@pytest.mark.parametrize("stored", ["bfloat16", "old names"])
def test_weights_come_from_the_file_whatever_it_calls_them(mini_vega: Path, stored: str, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        half = {key: tensor.bfloat16() for key, tensor in tensors.items()}
        return half if stored == "bfloat16" else old_names(tensors)

    checkpoint = rewritten(mini_vega, "vae", tmp_path / "checkpoint", change)
    export_checkpoint(checkpoint, tmp_path / "onnx", options=ExportOptions(components=("vae_decoder",)))  # compares too
    expected = load_component(checkpoint, "vae", torch.float32).state_dict()
    graph = ir.load(tmp_path / "onnx" / "vae_decoder" / "model.onnx").graph
    weights = {name: value.const_value.numpy() for name, value in graph.initializers.items() if name.startswith("vae.")}
    assert len(weights) >= 40
    for name, weight in weights.items():
        assert (torch.from_numpy(weight.copy()) == expected[name.removeprefix("vae.")]).all(), name


def test_a_weight_of_another_shape_is_refused(mini_vega: Path, tmp_path: Path) -> None:
    key = "conv_in.weight"
    checkpoint = rewritten(
        mini_vega, "unet", tmp_path / "checkpoint", lambda tensors: tensors | {key: tensors[key][:, :3].contiguous()}
    )
    with pytest.raises(UserError, match=r"conv_in.weight has shape \(32, 3, 3, 3\), its config.json means"):
        load_shapes(checkpoint, "unet", torch.float16)
