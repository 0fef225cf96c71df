"""Fixtures of the engines room; the toys they are made of are in `toys.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import StableDiffusionXLPipeline

import engines
from engines.building.build import build_bundle
from engines.bundle import Manifest, read_manifest
from engines.onnx_folder import read_onnx_folder
from engines.serving.environment import Environment, make_environment
from export import ExportOptions, export_checkpoint
from tests.engines.drawing import quiet
from tests.engines.serving.triton_here import ROOT
from tests.engines.toys import make_toy_onnx


@pytest.fixture(scope="session")
def toy_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_onnx(tmp_path_factory.mktemp("toy") / "onnx")


@pytest.fixture(scope="session")
def toy_onnx_fp16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_onnx(tmp_path_factory.mktemp("toy16") / "onnx", "fp16")


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory, toy_onnx: Path, toy_onnx_fp16: Path) -> Path:
    """ONNX Runtime engines in fp32 and TensorRT-RTX plans in fp16 of the toy, in one bundle. Do not write to it."""
    bundle = tmp_path_factory.mktemp("bundle") / "toy"
    build_bundle(toy_onnx, bundle, gpus=[], flavor="onnxruntime")
    build_bundle(toy_onnx_fp16, bundle, gpus=["a100", "rtx4090"], flavor="tensorrt-rtx")
    return bundle


@pytest.fixture(scope="session")
def toy_manifest(toy_bundle: Path) -> Manifest:
    return read_manifest(toy_bundle)


@pytest.fixture(scope="session")
def mini_onnx(tmp_path_factory: pytest.TempPathFactory, mini_vega: Path) -> Path:
    """A true export of the mini family at Vega's depth, in fp32, for prompts of 32 to 96 tokens."""
    out = tmp_path_factory.mktemp("mini") / "onnx"
    export_checkpoint(mini_vega, out, options=ExportOptions(precision="fp32", tokens=(96,)))
    return out


@pytest.fixture(scope="session")
def mini_bundle(tmp_path_factory: pytest.TempPathFactory, mini_onnx: Path) -> Path:
    """ONNX Runtime engines of it, for up to four pictures at once."""
    bundle = tmp_path_factory.mktemp("mini") / "bundle"
    components = list(read_onnx_folder(mini_onnx).components)
    build_bundle(mini_onnx, bundle, gpus=[], flavor="onnxruntime", batches=[1, 4], components=components)
    return bundle


@pytest.fixture(scope="module")
def reference(mini_vega: Path) -> StableDiffusionXLPipeline:
    """The checkpoint of `pipeline` as diffusers has it."""
    return quiet(StableDiffusionXLPipeline.from_pretrained(mini_vega))


@pytest.fixture(scope="module")
def pipeline(mini_bundle: Path) -> StableDiffusionXLPipeline:
    return quiet(engines.load(mini_bundle))


@pytest.fixture(scope="session")
def environment() -> Environment:
    """The Triton server and its client, installed once for all runs of the tests."""
    return make_environment(ROOT / "out/serving")
