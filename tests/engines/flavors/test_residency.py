"""What is on a small card when, against a stand-in whose plans have weights and whose GPU counts its bytes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import engines
from distill.common.errors import UserError
from engines.bundle import Engine, FileRecord, Manifest, Profile, ShapeRange
from engines.flavors import LoadOptions, residency, tensorrt
from engines.flavors.shared_runtime import SharedRuntime
from engines.flavors.tensorrt_engine import TensorRTEngine
from tests.engines.fake_tensorrt import FakeDevice, FakePlan, FakeTensorRT

MB = 1_000_000
WEIGHTS = {"text_encoder": MB, "text_encoder_2": 4 * MB, "unet": 10 * MB, "vae_decoder": MB}
SIDES = {"text_encoder": 8, "text_encoder_2": 8, "unet": 128, "vae_decoder": 256}  # activations: 128 bytes a pixel
LARGEST = 128 * 256**2
ORDER = list(WEIGHTS)


class SmallGPU(FakeDevice):
    """`most` is the largest sum so far of weights and activation memory."""

    def __init__(self) -> None:
        super().__init__()
        self.used = self.most = 0

    def take(self, count: int) -> None:
        self.used += count
        self.most = max(self.most, self.used)

    def empty(self, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        tensor = super().empty(shape, dtype)
        if dtype == torch.uint8:
            self.take(tensor.numel())
            weakref.finalize(tensor, self.take, -tensor.numel())
        return tensor


class WeighedPlan(FakePlan):
    def __init__(self, gpu: SmallGPU, blob: bytes, is_deferred: bool) -> None:
        super().__init__(profiles=1)
        self.gpu, self.blob, self.weights_loaded = gpu, blob, False
        self.lets_go = True
        self.is_deferred = is_deferred
        if not is_deferred:
            self._load()
            weakref.finalize(self, gpu.take, -len(blob))

    def _load(self) -> None:
        self.weights_loaded = True
        self.gpu.take(len(self.blob))

    def load_weights(self, blob: bytes) -> bool:
        if not self.is_deferred or self.weights_loaded or blob != self.blob:
            return False
        self._load()
        return True

    def unload_weights(self) -> bool:
        was, self.weights_loaded = self.weights_loaded, False
        self.gpu.take(-len(self.blob) * was)
        return was


class WeighedTensorRT(FakeTensorRT):
    """`opened` are the components whose plan was deserialised; each is called by the last byte of its plan."""

    def __init__(self, gpu: SmallGPU) -> None:
        super().__init__()
        self.gpu, self.opened = gpu, list[str]()

    def Runtime(self, logger: Any) -> Any:
        runtime = SimpleNamespace(defer_weights_loading=False)

        def deserialise(blob: bytes) -> WeighedPlan:
            self.opened.append(ORDER[blob[-1]])
            deferred, runtime.defer_weights_loading = runtime.defer_weights_loading, False
            return WeighedPlan(self.gpu, blob, deferred)

        runtime.deserialize_cuda_engine = deserialise
        return runtime


def record(manifest: Manifest, flavor: str, name: str) -> Engine:
    unet = next(engine for engine in manifest.engines if engine.component == "unet")
    side = SIDES[name]
    shapes = {"sample": ShapeRange(min=[1, 4, 8, 8], opt=[2, 4, side, side], max=[2, 4, side, side])}
    size = f"{side * 8}x{side * 8}"
    return unet.model_copy(
        update={
            "component": name,
            "flavor": flavor,
            "layout": "ranged",
            "profiles": [
                Profile(index=0, resolutions=[size, "64x64"] if side > 8 else ["64x64"], batch=1, shapes=shapes)
            ],
            "inputs": [t.model_copy(update={"dtype": "float32"}) for t in unet.inputs if t.name == "sample"],
            "outputs": [t.model_copy(update={"dtype": "float32"}) for t in unet.outputs],
            "files": [FileRecord(path=f"{name}/{name}.plan", sha256="0" * 64, size_bytes=WEIGHTS[name])],
            "options": {},
        }
    )


class Card:
    def __init__(self, manifest: Manifest, tmp_path: Path, flavor: str, budget: int | None, names: list[str] = ORDER):
        self.gpu = SmallGPU()
        self.trt = WeighedTensorRT(self.gpu)
        options = LoadOptions(device="cpu", runtime_cache=tmp_path / "cache", vram_bytes=budget)
        self.shared = SharedRuntime(self.trt, options, self.gpu)  # type: ignore[arg-type]
        self.plans = {}
        for name in names:
            blob = bytes(WEIGHTS[name] - 1) + bytes([ORDER.index(name)])
            self.plans[name] = TensorRTEngine(record(manifest, flavor, name), blob, self.shared, "rebuild it")

    def run(self, name: str) -> None:
        plan = self.plans[name]
        sample = torch.full((2, 4, SIDES[name], SIDES[name]), 3.0)
        [profile] = plan.record.profiles
        assert torch.equal(plan.run({"sample": sample}, profile)["out_sample"], 2 * sample)

    def draw(self) -> None:
        for name in ("text_encoder", "text_encoder_2", "unet", "unet", "unet", "vae_decoder"):
            self.run(name)

    @property
    def here(self) -> list[str]:
        return [plan.record.component for plan in self.shared.residency._here]


def refused(call: Callable[[], Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        call()


@pytest.fixture(autouse=True)
def no_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "RESERVE_BYTES", 1000)


@pytest.mark.filterwarnings("ignore:vram_gb")
@pytest.mark.parametrize("flavor", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("budget", [100 * MB, 15 * MB, 13 * MB])
def test_a_budget_is_kept_in_every_moment(toy_manifest: Manifest, tmp_path: Path, flavor: str, budget: int) -> None:
    """The UNet takes 12.1 MB, the VAE 9.4, all together 24.4."""
    card = Card(toy_manifest, tmp_path, flavor, budget)
    card.shared.residency.settle()
    for _ in range(3):
        card.draw()
    assert 12 * MB < card.gpu.most <= budget
    if budget == 100 * MB:
        assert set(card.here) == set(ORDER), "what has room stays"


def test_what_was_used_longest_ago_leaves_first_and_contexts_of_rtx_stay(
    toy_manifest: Manifest, tmp_path: Path
) -> None:
    card = Card(toy_manifest, tmp_path, "tensorrt-rtx", 17 * MB)
    assert card.gpu.used < MB and card.here == [], "an open plan has no weights yet"
    with pytest.warns(UserWarning) as told:
        card.run("text_encoder")
        card.run("text_encoder_2")
        card.run("unet")
        assert card.here == ["text_encoder_2", "unet"]
        contexts = list(card.plans["text_encoder"]._contexts.values())
        card.run("vae_decoder")
        assert card.here == ["vae_decoder"], "10 MB of weights leave for 8 MB of activations"
        card.draw()
        card.draw()
    assert list(card.plans["text_encoder"]._contexts.values()) == contexts
    assert card.trt.opened == ORDER, "nothing was opened twice"
    lines = sorted(str(one.message).partition(" had left")[0] for one in told if "vram_gb" in str(one.message))
    assert lines == [f"vram_gb: the weights of the {name}" for name in sorted(ORDER)], "each is told once"


@pytest.mark.filterwarnings("ignore:vram_gb")
def test_a_plan_of_tensorrt_is_opened_anew(toy_manifest: Manifest, tmp_path: Path) -> None:
    card = Card(toy_manifest, tmp_path, "tensorrt", 13 * MB)
    assert card.gpu.most <= 13 * MB, "while loading too"
    card.draw()
    assert card.trt.opened[:4] == ORDER and len(card.trt.opened) > 4


def test_without_a_budget_all_stay(toy_manifest: Manifest, tmp_path: Path) -> None:
    card = Card(toy_manifest, tmp_path, "tensorrt-rtx", None)
    assert card.gpu.used == sum(WEIGHTS.values()) + LARGEST + residency.ALIGNMENT
    before, opened = card.gpu.used, list(card.trt.opened)
    card.draw()
    assert (card.gpu.used, card.trt.opened) == (before, opened)


@pytest.mark.parametrize("flavor", ["tensorrt", "tensorrt-rtx"])
def test_too_small_a_budget_is_refused_with_the_least_that_works(
    toy_manifest: Manifest, tmp_path: Path, flavor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(toy_manifest, tmp_path, flavor, 12 * MB)
    line = r"the unet takes 10 MB of weights, 2\.1 MB of activations .* the least that works is vram_gb=0\.1"
    refused(card.shared.residency.settle, line)
    least = 10 * MB + 128 * 128**2 + 1000
    card = Card(toy_manifest, tmp_path, flavor, least)
    card.shared.residency.settle()
    card = Card(toy_manifest, tmp_path, flavor, least - 1)
    refused(card.shared.residency.settle, "the least that works")
    monkeypatch.setattr(FakeDevice, "free_bytes", lambda self: 11 * MB)
    card = Card(toy_manifest, tmp_path, flavor, 100 * MB)
    refused(card.shared.residency.settle, "11 MB of the GPU's memory may be used")


def test_other_weights_do_not_come_back(toy_manifest: Manifest, tmp_path: Path) -> None:
    card = Card(toy_manifest, tmp_path, "tensorrt-rtx", 100 * MB)
    unet = card.plans["unet"]
    refused(unet.require_exchangeable, "others and LoRAs would be lost")
    refused(lambda: unet.refit(None), "others and LoRAs would be lost")  # type: ignore[arg-type]


def load_on(monkeypatch: pytest.MonkeyPatch, gpus: dict[str, tuple[str, str]]) -> None:
    monkeypatch.setattr(tensorrt, "gpu_of_device", gpus.get)
    monkeypatch.setattr(tensorrt, "driver_at_hand", lambda: None)
    monkeypatch.setattr("engines.selection.gpu_count", lambda: len(gpus))


def test_a_pipeline_is_refused_before_a_file_is_opened(
    toy_bundle: Path, toy_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_on(monkeypatch, {"cuda:0": ("NVIDIA A100", "8.0")})
    monkeypatch.setattr("engines.pipeline.find_faults", lambda *_: pytest.fail("a file was opened"))
    monkeypatch.setattr(residency, "RESERVE_BYTES", 300 * MB)
    rtx = {"flavor": "tensorrt-rtx"}
    refused(lambda: engines.load(toy_bundle, **rtx, vram_gb=0.2), r"takes more than vram_gb=0\.4")
    refused(lambda: engines.load(toy_bundle, flavor="onnxruntime", vram_gb=8), "vram_gb is for TensorRT's plans")
    refused(lambda: engines.load(toy_bundle, **rtx, vram_gb=0), "vram-gb is 0; it must be above 0")


@pytest.mark.parametrize("flavor", [None, "tensorrt-rtx"])
def test_of_several_gpus_the_first_that_fits_is_used(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch, flavor: str | None
) -> None:
    gpus = {"cuda:0": ("NVIDIA H100", "9.0"), "cuda:1": ("NVIDIA RTX 4090", "8.9"), "cuda:2": ("NVIDIA A100", "8.0")}
    load_on(monkeypatch, gpus)
    opened = []
    monkeypatch.setattr(tensorrt.TensorRTFlavor, "open_bundle", lambda self, options: options)
    monkeypatch.setattr(tensorrt.TensorRTFlavor, "settle", lambda self, shared: None)
    monkeypatch.setattr(tensorrt.TensorRTFlavor, "load", lambda *given: opened.append(given[-1].device))
    assert str(engines.load(toy_bundle, flavor).unet.device) == "cuda:1" and opened == ["cuda:1"] * 4
    monkeypatch.setattr(tensorrt, "memory_of_device", {"cuda:1": 1, "cuda:2": 10**10}.get)
    assert str(engines.load(toy_bundle, flavor).unet.device) == "cuda:2", "the first has too little memory"
    refused(
        lambda: engines.load(toy_bundle, "tensorrt-rtx", device="cuda:1"), "NVIDIA RTX 4090 has 1 B of memory in all"
    )
    load_on(monkeypatch, {"cuda:0": gpus["cuda:0"]})
    refused(lambda: engines.load(toy_bundle, "tensorrt-rtx"), "this GPU is NVIDIA H100 with 9.0")
