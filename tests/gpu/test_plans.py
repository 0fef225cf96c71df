"""Plans on the GPU at hand: built here, run, refitted, stripped; beside ONNX Runtime's pictures of the same weights.

Each test runs for every TensorRT module that is installed and targets this GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

import engines
from distill.checkpoints.sources import resolve
from distill.common.errors import UserError
from engines.building.build import build_bundle
from engines.building.options import builder_options
from engines.bundle import read_manifest
from engines.choices import Layout
from engines.flavors import find_flavor, residency
from engines.gpus import gpu_at_hand
from export import ExportOptions, export_checkpoint
from export.checks.parity import BOUNDS
from tests.engines.drawing import quiet
from tests.engines.in_use import worst_errors
from tests.engines.toys import make_toy_onnx

SIZES = ("128x128", "224x96", "96x224")
COMPONENTS = ("unet", "vae_decoder", "text_encoder", "text_encoder_2")


def usable_flavors() -> list[str]:
    """TensorRT modules that can be imported and target this GPU."""
    found = gpu_at_hand()
    assert found is not None
    usable = []
    for name in ("tensorrt", "tensorrt-rtx"):
        flavor = find_flavor(name)
        try:
            flavor.version()
        except UserError:
            continue
        if found[1] in (flavor.targets or ()):
            usable.append(name)
    return usable


FLAVORS = usable_flavors()


def test_some_tensorrt_is_for_this_gpu() -> None:
    """Else the tests below are none."""
    assert FLAVORS, (
        f"no TensorRT module that is installed targets {gpu_at_hand()}; TensorRT itself does: "
        f"{sys.executable} -m pip install -c constraints.txt -e '.[gpu]'"
    )


@pytest.fixture(scope="module")
def mini_onnx(tmp_path_factory: pytest.TempPathFactory, mini_vega: Path) -> dict[str, Path]:
    """A true export at Vega's depth, in fp16 and fp32."""
    root = tmp_path_factory.mktemp("gpu")
    for precision in ("fp16", "fp32"):
        options = ExportOptions(precision=precision, components=COMPONENTS)
        export_checkpoint(mini_vega, root / precision, options=options)
    return {precision: root / precision for precision in ("fp16", "fp32")}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, mini_onnx: dict[str, Path]) -> dict[str, np.ndarray]:
    """ONNX Runtime's pictures in fp32, on the CPU."""
    bundle = tmp_path_factory.mktemp("reference") / "bundle"
    build_bundle(mini_onnx["fp32"], bundle, gpus=[], flavor="onnxruntime")
    pipeline = engines.load(bundle, flavor="onnxruntime", device="cpu")
    return {size: draw(pipeline, size) for size in SIZES}


def draw(pipeline: object, size: str, **arguments: object) -> np.ndarray:
    width, height = map(int, size.split("x"))
    settings = {"num_inference_steps": 4, "width": width, "height": height, "output_type": "np"} | arguments
    return pipeline("a red circle", generator=torch.Generator().manual_seed(3), **settings).images[0]  # type: ignore[operator]


def psnr_db(image: np.ndarray, other: np.ndarray) -> float:
    assert np.isfinite(image).all() and image.std() > 0.01
    return float(-10 * np.log10(max(np.mean((image - other) ** 2), 1e-12)))


def build(onnx: Path, out: Path, flavor: str, layout: Layout | None = None, **options: bool) -> Path:
    build_bundle(
        onnx,
        out,
        gpus=["auto"],
        flavor=flavor,
        layout=layout,
        resolutions=",".join(SIZES),
        options=builder_options(flavor, **options),  # type: ignore[arg-type]
    )
    return out


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize("layout", ["ranged", "shared", "per-resolution"])
def test_pictures_in_any_order_of_sizes(
    flavor: str, layout: Layout, mini_onnx: dict[str, Path], reference: dict[str, np.ndarray], tmp_path: Path
) -> None:
    pipeline = engines.load(build(mini_onnx["fp16"], tmp_path / "bundle", flavor, layout), flavor=flavor)
    for size in [*SIZES, *reversed(SIZES)]:
        assert psnr_db(draw(pipeline, size), reference[size]) > 30, size


@pytest.fixture(scope="module")
def other_onnx(tmp_path_factory: pytest.TempPathFactory, mini_vega: Path) -> Path:
    """An export in fp16 of the same checkpoint with another UNet."""
    root = tmp_path_factory.mktemp("other")
    checkpoint = Path(shutil.copytree(mini_vega, root / "checkpoint"))
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in unet.parameters():
            weight.mul_(1 + 0.3 * torch.randn(weight.shape, generator=generator))
    unet.save_pretrained(checkpoint / "unet")
    export_checkpoint(checkpoint, root / "onnx", options=ExportOptions(precision="fp16", components=COMPONENTS))
    return root / "onnx"


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, workdir: Path) -> tuple[Path, Path]:
    """The taught mini teacher: its checkpoint and its export in fp16."""
    checkpoint, onnx = resolve("mini:sdxl", workdir), tmp_path_factory.mktemp("taught") / "onnx"
    export_checkpoint(checkpoint, onnx, options=ExportOptions(precision="fp16", components=COMPONENTS))
    return checkpoint, onnx


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize("layout", ["ranged", "shared"])
def test_every_plan_is_near_fp32_on_what_a_taught_model_computes(
    flavor: str, layout: Layout, taught: tuple[Path, Path], tmp_path: Path
) -> None:
    """Attention and its accumulation above all: a taught network's activations, not random ones."""
    checkpoint, onnx = taught
    ours = engines.load(build(onnx, tmp_path / "bundle", flavor, layout), flavor=flavor)
    reference = quiet(StableDiffusionXLPipeline.from_pretrained(checkpoint))  # fp32, on the CPU
    for size in SIZES:
        width, height = map(int, size.split("x"))
        settings = {"width": width, "height": height, "num_inference_steps": 6}
        errors = worst_errors(ours, reference, prompt="a large red circle on blue", **settings)
        assert len(errors) == 5 and all(error <= BOUNDS["fp16"].relative for error in errors.values()), (size, errors)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_a_budget_draws_the_same_pictures_with_the_weights_taking_turns(
    flavor: str, mini_onnx: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "RESERVE_BYTES", 1_000_000)  # the mini plans are far smaller than the true reserve
    bundle = build(mini_onnx["fp16"], tmp_path / "bundle", flavor)
    whole = quiet(engines.load(bundle, flavor=flavor))
    with pytest.raises(UserError, match=r"the least that works is|takes more than") as refusal:
        engines.load(bundle, flavor=flavor, vram_gb=0.001)
    assert "vram_gb=" in str(refusal.value)
    parts = [pair for part in whole.components.values() if hasattr(part, "engines") for pair in part.engines]
    least = (
        max(engine.size_bytes + loaded.activation_bytes for engine, loaded in parts) + residency.RESERVE_BYTES + 1000
    )  # type: ignore[attr-defined]
    small = quiet(engines.load(bundle, flavor=flavor, vram_gb=least / 1e9))
    plans = [loaded for part in small.components.values() if hasattr(part, "engines") for _, loaded in part.engines]
    keeper = plans[0]._shared.residency  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="had left the GPU, and came back in"):
        for size in [*SIZES, *reversed(SIZES)]:
            assert psnr_db(draw(small, size), draw(whole, size)) > 60, size
            held = sum(plan.record.size_bytes for plan in keeper._here)
            assert held + keeper.memory.size_bytes <= least
    before = keeper._device.free_bytes()
    last = list(keeper._here)[-1]
    with keeper._device.current():
        keeper._device.synchronize()
        last.unload_weights()
    assert keeper._device.free_bytes() - before >= last.record.weights_bytes / 2, "the GPU has it back"


@pytest.mark.parametrize("flavor", FLAVORS)
def test_graphs_caches_and_moved_memory_change_no_picture(
    flavor: str, mini_onnx: dict[str, Path], tmp_path: Path
) -> None:
    bundle = build(mini_onnx["fp16"], tmp_path / "bundle", flavor)
    kernels = tmp_path / "kernels"
    pipeline = engines.load(bundle, flavor=flavor, runtime_cache=kernels)
    own = {size: draw(pipeline, size) for size in SIZES}
    _, unet = pipeline.unet.engines[0]
    unet._shared.memory.reserve(2 * unet._shared.memory.size_bytes)  # after graphs were captured over it
    assert all(psnr_db(draw(pipeline, size), own[size]) > 60 for size in SIZES)
    plain = engines.load(bundle, flavor=flavor, runtime_cache=kernels, cuda_graphs=False)
    assert all(psnr_db(draw(plain, size), own[size]) > 60 for size in SIZES)
    if flavor == "tensorrt-rtx":
        files = {path: path.read_bytes() for path in kernels.iterdir()}
        again = engines.load(bundle, flavor=flavor, runtime_cache=kernels)
        assert again.unet.engines[0][1].cache._saved, "the kernels were read"
        assert all(psnr_db(draw(again, size), own[size]) > 60 for size in SIZES)
        assert len(files) == len(COMPONENTS) and files.keys() == set(kernels.iterdir())


@pytest.mark.parametrize("flavor", FLAVORS)
def test_a_pipeline_outlives_a_full_gpu(flavor: str, mini_onnx: dict[str, Path], tmp_path: Path) -> None:
    pipeline = engines.load(build(mini_onnx["fp16"], tmp_path / "bundle", flavor), flavor=flavor)
    own = draw(pipeline, SIZES[0])
    torch.cuda.empty_cache()
    filled = []
    for count in (1 << 28, 1 << 24, 1 << 21):
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                filled.append(torch.empty(count, dtype=torch.uint8, device="cuda"))
    with contextlib.suppress(torch.OutOfMemoryError):  # nothing else may be raised
        draw(pipeline, SIZES[1])
    filled.clear()
    torch.cuda.empty_cache()
    assert psnr_db(draw(pipeline, SIZES[0]), own) > 60
    draw(pipeline, SIZES[1])


@pytest.mark.parametrize("flavor", FLAVORS)
def test_a_step_of_the_unet_never_waits_for_the_host(flavor: str, mini_onnx: dict[str, Path], tmp_path: Path) -> None:
    pipeline = engines.load(build(mini_onnx["fp16"], tmp_path / "bundle", flavor), flavor=flavor)
    unet, device = pipeline.unet, pipeline.unet.device
    inputs = {tensor.name: tensor for tensor in unet.component.engines[0][0].inputs}
    sample = torch.randn(2, 4, 16, 16, device=device, dtype=unet.dtype)
    states = torch.randn(2, *map(int, inputs["encoder_hidden_states"].shape[1:]), device=device, dtype=unet.dtype)
    added = {
        "text_embeds": torch.randn(2, int(inputs["text_embeds"].shape[1]), device=device),
        "time_ids": torch.ones(2, 6, device=device),
    }
    timestep = torch.tensor(500.0, device=device)
    first = unet(sample, timestep, states, added_cond_kwargs=added).sample  # compiles and captures
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [unet(sample, timestep, states, added_cond_kwargs=added).sample for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first, result) for result in again)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_refit_draws_the_pictures_of_the_other_weights(
    flavor: str, mini_onnx: dict[str, Path], other_onnx: Path, tmp_path: Path
) -> None:
    """A plan built from one set of weights, given another, draws what a plan built from the other draws; and back."""
    first, second = mini_onnx["fp16"], other_onnx
    if flavor == "tensorrt" and find_flavor(flavor).version().startswith("11.3"):
        with pytest.raises(UserError, match=r"11\.3 gives wrong output"):
            build(first, tmp_path / "refit", flavor, refit=True)
        return
    plans = build(first, tmp_path / "refit", flavor, refit=True)
    assert all(engine.options == {"refit": True} for engine in read_manifest(plans).engines)
    pipeline = engines.load(plans, flavor=flavor)
    expected = draw(engines.load(build(second, tmp_path / "other", flavor), flavor=flavor), SIZES[0])
    own = draw(pipeline, SIZES[0])
    assert psnr_db(own, expected) < 30, "the two sets of weights draw different pictures"
    assert sorted(engines.refit(pipeline, second)) == sorted(COMPONENTS)
    assert psnr_db(draw(pipeline, SIZES[0]), expected) > 40
    engines.refit(pipeline, first)
    assert psnr_db(draw(pipeline, SIZES[0]), own) > 40


@pytest.mark.parametrize("flavor", FLAVORS)
def test_stripped_plans_are_small_and_draw_the_same(
    flavor: str, mini_onnx: dict[str, Path], reference: dict[str, np.ndarray], tmp_path: Path
) -> None:
    whole = read_manifest(build(mini_onnx["fp16"], tmp_path / "whole", flavor))
    bundle = build(mini_onnx["fp16"], tmp_path / "stripped", flavor, strip=True)
    for stripped, full in zip(read_manifest(bundle).engines, whole.engines, strict=True):
        assert stripped.size_bytes < full.size_bytes, stripped.component
    with pytest.raises(UserError, match="a plan without weights"):
        engines.load(bundle, flavor=flavor)
    pipeline = engines.load(bundle, flavor=flavor, weights=mini_onnx["fp16"])
    assert psnr_db(draw(pipeline, SIZES[0]), reference[SIZES[0]]) > 30


@pytest.mark.parametrize("flavor", FLAVORS)
def test_the_program_without_torch(flavor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """engines/examples/without_torch.py on plans gives the latents of the pipeline."""
    monkeypatch.syspath_prepend(str(Path(engines.__file__).with_name("examples")))
    bundle = build(make_toy_onnx(tmp_path / "onnx", "fp16"), tmp_path / "bundle", flavor)
    noise = np.random.default_rng(1).standard_normal((1, 4, 12, 28))
    example = importlib.import_module("without_torch")
    latent = example.text_to_latent(bundle, "a red circle", "224x96", 4, 5.0, noise, flavor)
    start = torch.from_numpy(noise).half()
    settings = {"guidance_scale": 5.0, "latents": start, "output_type": "latent"}
    expected = draw(engines.load(bundle, flavor=flavor), "224x96", **settings).float().cpu().numpy()  # type: ignore[attr-defined]
    assert np.abs(latent - expected).max() < 2e-2 * np.abs(expected).max()
    sys.modules.pop("run_tensorrt", None)
