from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import export.graph.trace as tracing
from distill.checkpoints.load import load_component
from distill.models.resolution import Resolution
from export.checks.parity import compare
from export.components import COMPONENTS
from export.graph.opening import CannotOpen
from export.graph.trace import capture, make_lean, trace
from export.graph.wrappers import wrap
from export.job import make_config

SIZES = [Resolution(96, 160), Resolution(128, 64)]


def traced(checkpoint: Path, name: str, dtype: torch.dtype, opset: int) -> tuple[ir.Model, torch.nn.Module, dict]:
    component, config = COMPONENTS[name], make_config(checkpoint, name)
    module = wrap(name, load_component(checkpoint, component.source, dtype))
    precision = "fp16" if dtype is torch.float16 else "fp32"
    inputs, outputs = (
        make(config, Resolution(160, 128), 2, precision) for make in (component.inputs, component.outputs)
    )
    return trace(component, module, config, inputs, outputs, opset), module, config


def saved(model: ir.Model, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    return folder / "model.onnx"


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "fp32"), (torch.float16, "fp16")])
def test_the_fallback_opset_spells_attention_out_and_computes_the_same(
    mini_vega: Path, tmp_path: Path, dtype: torch.dtype, precision: str
) -> None:
    model, module, config = traced(mini_vega, "unet", dtype, 18)
    kinds = Counter(node.op_type for node in model.graph)
    assert model.opset_imports[""] == 18
    assert not kinds["Attention"] and not kinds["GroupNormalization"] and kinds["Softmax"] == 30
    file = saved(model, tmp_path / precision)
    onnx.checker.check_model(str(file), full_check=True)
    assert all(result.passed for result in compare("unet", file, module, config, SIZES, [3], precision))


def test_the_default_opset_keeps_attention_and_group_norm_whole(onnx_fp32: Path) -> None:
    kinds = Counter(
        node.op_type for node in onnx.load(onnx_fp32 / "unet" / "model.onnx", load_external_data=False).graph.node
    )
    assert (kinds["Attention"], kinds["GroupNormalization"]) == (30, 43)


def test_opening_and_symbols_give_the_same_numbers(
    mini_vega: Path, onnx_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise CannotOpen("test")

    monkeypatch.setattr(tracing, "open_dimensions", refuse)
    model, _, config = traced(mini_vega, "vae_decoder", torch.float32, 23)
    sessions = [
        onnxruntime.InferenceSession(str(file))
        for file in (saved(model, tmp_path / "symbols"), onnx_fp32 / "vae_decoder" / "model.onnx")
    ]
    assert [session.get_outputs()[0].shape for session in sessions] == [["batch", 3, "8 * height", "8 * width"]] * 2
    for size in SIZES:
        [spec] = COMPONENTS["vae_decoder"].inputs(config, size, 3, "fp32")
        feed = {spec.name: np.random.default_rng(0).standard_normal(spec.shape, dtype=np.float32)}
        with_symbols, opened = (session.run(None, feed)[0] for session in sessions)
        assert np.abs(with_symbols - opened).max() < 1e-5 * np.abs(opened).max()


@pytest.mark.parametrize("opset", [23, 18])
@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_text_encoders_are_opened_too(
    mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, opset: int
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("traced with symbols")

    monkeypatch.setattr(tracing, "capture_with_symbols", refuse)
    model, module, config = traced(mini_vega, name, torch.float32, opset)
    file = saved(model, tmp_path / name)
    onnx.checker.check_model(str(file), full_check=True)
    assert all(result.passed for result in compare(name, file, module, config, SIZES[:1], [1, 5], "fp32"))


def test_only_known_operators_skip_decomposition() -> None:
    class Known(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(torch.nn.functional.silu(x), 0.5, self.training).contiguous() + x

    class Foreign(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.logcumsumexp(x, 0)

    class Mixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x.half()

    class MixedComparison(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.int() == 0.5

    class Shared(torch.nn.Module):  # written into where a view of it is read later
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            full = torch.full((8, 8), 1.0)
            view = full.view(64)
            full.masked_fill_(x[0, 0] < x[0, 1], 0)
            return view

    spec = COMPONENTS["vae_encoder"].inputs(
        {"block_out_channels": [1], "in_channels": 3, "latent_channels": 4}, Resolution(8, 8), 1, "fp32"
    )
    programs = {
        kind: capture(kind().eval(), spec, [spec[0].shape]) for kind in (Known, Foreign, Mixed, MixedComparison, Shared)
    }
    assert {kind: make_lean(program) for kind, program in programs.items()} == {
        Known: True,
        Foreign: False,
        Mixed: False,
        MixedComparison: False,
        Shared: False,
    }
    names = [str(node.target) for node in programs[Known].graph.nodes if node.op == "call_function"]
    assert names == ["aten.silu.default", "aten.add.Tensor"]
