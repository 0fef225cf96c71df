"""How plans are run, against a stand-in for TensorRT and CUDA: the memory, the graphs, the caches, the copies."""

from __future__ import annotations

import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from distill.common.errors import UserError
from engines.bundle import Engine, Manifest, Profile, ShapeRange
from engines.flavors import LoadOptions
from engines.flavors.kernel_cache import KernelCache
from engines.flavors.shared_runtime import SharedRuntime
from engines.flavors.tensorrt_engine import TensorRTEngine
from engines.onnx_folder import weights_for
from tests.engines import fake_tensorrt
from tests.engines.fake_tensorrt import FakeCache, FakeContext, FakeDevice, FakeRefitter, FakeTensorRT
from tests.engines.toys import make_toy_onnx

SIZES = ["128x128", "224x96", "96x224"]


def profile(index: int, sizes: list[str], exact: bool) -> Profile:
    shapes = [[2, 4, int(s.split("x")[1]) // 8, int(s.split("x")[0]) // 8] for s in sizes]
    low = [min(side) for side in zip(*shapes, strict=True)]
    high = [max(side) for side in zip(*shapes, strict=True)]
    if not exact:
        low[0] = 1
    return Profile(
        index=index, resolutions=sizes, batch=1, shapes={"sample": ShapeRange(min=low, opt=shapes[0], max=high)}
    )


def make(
    manifest: Manifest, tmp_path: Path, flavor: str = "tensorrt", layout: str = "ranged", **options: Any
) -> tuple[TensorRTEngine, FakeTensorRT, SharedRuntime, Engine]:
    ranged = layout == "ranged"
    profiles = [profile(0, SIZES, False)] if ranged else [profile(i, [s], True) for i, s in enumerate(SIZES)]
    unet = next(engine for engine in manifest.engines if engine.component == "unet")
    sample = [tensor.model_copy(update={"dtype": "float32"}) for tensor in unet.inputs if tensor.name == "sample"]
    outputs = [tensor.model_copy(update={"dtype": "float32"}) for tensor in unet.outputs]
    engine = unet.model_copy(
        update={"flavor": flavor, "layout": layout, "profiles": profiles, "inputs": sample, "outputs": outputs}
        | {"options": options.pop("built_with", {})}
    )
    faults = {name: options.pop(name) for name in ("header_reasons", "refuses") if name in options}
    trt = FakeTensorRT(profiles=len(profiles), **faults)
    folder = options.pop("weights", None)
    settings = LoadOptions(device="cpu", runtime_cache=tmp_path / "cache", **options)
    shared = SharedRuntime(trt, settings, FakeDevice())  # type: ignore[arg-type]
    weights = weights_for(engine, folder) if folder else None
    return TensorRTEngine(engine, b"plan", shared, "rebuild it", weights), trt, shared, engine


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's graphs with other weights, as a fine-tune would have."""
    return make_toy_onnx(tmp_path_factory.mktemp("tuned") / "onnx", seed=9)


def sample(size: str, value: float = 1.0) -> torch.Tensor:
    width, height = map(int, size.split("x"))
    return torch.full((2, 4, height // 8, width // 8), value)


@pytest.mark.parametrize("flavor", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("layout", ["ranged", "shared"])
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_every_size_in_any_order(
    toy_manifest: Manifest, tmp_path: Path, flavor: str, layout: str, cuda_graphs: bool
) -> None:
    loaded, trt, shared, engine = make(toy_manifest, tmp_path, flavor, layout, cuda_graphs=cuda_graphs)
    for value, size in enumerate([*SIZES, *reversed(SIZES), SIZES[0]], start=1):
        index = 0 if layout == "ranged" else SIZES.index(size)
        result = loaded.run({"sample": sample(size, value)}, engine.profiles[index])["out_sample"]
        assert torch.equal(result, sample(size, 2.0 * value))
    ran = [context for context in trt.plan.contexts if context.enqueued]
    assert len(ran) == 3, "one context for each size, made once"
    assert [context.profile for context in ran] == ([0, 0, 0] if layout == "ranged" else [0, 1, 2])
    assert len({context.memory for context in ran}) == 1, "all share one activation buffer"
    captured_here = flavor == "tensorrt" and cuda_graphs
    assert shared.device.captures == (3 if captured_here else 0)  # type: ignore[attr-defined]


def test_results_belong_to_the_caller(toy_manifest: Manifest, tmp_path: Path) -> None:
    loaded, _, _, engine = make(toy_manifest, tmp_path)
    first = loaded.run({"sample": sample("128x128", 1)}, engine.profiles[0])["out_sample"]
    loaded.run({"sample": sample("128x128", 5)}, engine.profiles[0])
    assert torch.equal(first, sample("128x128", 2))


def test_an_input_changed_in_place_is_copied_again_and_an_unchanged_one_is_not(
    toy_manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, _, _, engine = make(toy_manifest, tmp_path)
    latent = sample("128x128", 1)
    loaded.run({"sample": latent}, engine.profiles[0])
    copies = []
    real = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda self, *a, **k: copies.append(a[0] is latent) or real(self, *a, **k)
    )
    loaded.run({"sample": latent}, engine.profiles[0])
    assert copies.count(True) == 0
    latent.mul_(3)
    assert torch.equal(loaded.run({"sample": latent}, engine.profiles[0])["out_sample"], sample("128x128", 6))
    assert copies.count(True) == 1
    with torch.inference_mode():
        untracked = sample("128x128", 1)
        for value in (1, 4):
            untracked.fill_(value)
            result = loaded.run({"sample": untracked}, engine.profiles[0])["out_sample"]
            assert torch.equal(result, sample("128x128", 2 * value))


def test_activation_memory_holds_the_largest_need_and_a_range_is_asked_for_its_own_sizes(
    toy_manifest: Manifest, tmp_path: Path
) -> None:
    _, _, ranged, _ = make(toy_manifest, tmp_path)
    assert ranged.memory.size_bytes == 16 * 2 * 4 * 12 * 28, "of 224x96, not of the range's corner 224x224"
    _, _, shared, _ = make(toy_manifest, tmp_path, layout="shared")
    assert shared.memory.size_bytes == 300_000


def test_graph_is_captured_anew_when_the_memory_moves(toy_manifest: Manifest, tmp_path: Path) -> None:
    loaded, trt, shared, engine = make(toy_manifest, tmp_path)
    loaded.run({"sample": sample("128x128")}, engine.profiles[0])
    old = next(context.memory for context in trt.plan.contexts if context.enqueued)
    shared.memory.reserve(10_000_000)
    result = loaded.run({"sample": sample("128x128", 3)}, engine.profiles[0])["out_sample"]
    assert torch.equal(result, sample("128x128", 6))
    assert shared.device.captures == 2  # type: ignore[attr-defined]
    assert next(context.memory for context in trt.plan.contexts if context.enqueued) != old


def test_a_shape_whose_graph_cannot_be_captured_runs_without_one_and_says_so_once(
    toy_manifest: Manifest, tmp_path: Path
) -> None:
    loaded, _, shared, engine = make(toy_manifest, tmp_path)
    shared.device.fails_to_capture = True  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="unet runs without a CUDA graph.*capturing") as told:
        for value in (1, 3):
            result = loaded.run({"sample": sample("128x128", value)}, engine.profiles[0])["out_sample"]
            assert torch.equal(result, sample("128x128", 2 * value))
    assert len(told) == 1 and shared.device.captures == 1  # type: ignore[attr-defined]


def test_threads_get_their_own_pictures(
    toy_manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs lie in buffers that all calls of a shape share; here each call waits between filling and reading them."""
    loaded, _, _, engine = make(toy_manifest, tmp_path, cuda_graphs=False)
    enqueue = FakeContext.execute_async_v3

    def slowly(context: FakeContext, stream: int) -> bool:
        time.sleep(0.005)
        return enqueue(context, stream)

    monkeypatch.setattr(FakeContext, "execute_async_v3", slowly)

    def draw(value: int) -> bool:
        result = loaded.run({"sample": sample("128x128", value)}, engine.profiles[0])["out_sample"]
        return torch.equal(result, sample("128x128", 2 * value))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(draw, range(16)))


def test_of_more_shapes_than_are_kept_the_one_used_longest_ago_goes(toy_manifest: Manifest, tmp_path: Path) -> None:
    loaded, trt, shared, engine = make(toy_manifest, tmp_path, most_shapes=2)

    def run(size: str) -> int:
        result = loaded.run({"sample": sample(size, 3)}, engine.profiles[0])["out_sample"]
        assert torch.equal(result, sample(size, 6))
        return sum(bool(context.enqueued) for context in trt.plan.contexts)

    assert [run(size) for size in ("128x128", "224x96", "128x128", "96x224")] == [1, 2, 2, 3]
    assert shared.device.synchronized == 1, "what went may have been at work"  # type: ignore[attr-defined]
    assert [run(size) for size in ("128x128", "224x96")] == [3, 4]


@pytest.mark.parametrize(
    "call, answer, told",
    [
        ("set_input_shape", False, "cannot be"),
        ("set_optimization_profile_async", False, "has no profile 0"),
        ("set_tensor_address", False, "takes no address"),
        ("update_device_memory_size_for_shapes", 0, "does not say how much memory"),
    ],
)
def test_what_tensorrt_refuses_is_not_run(
    toy_manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, answer: Any, told: str
) -> None:
    monkeypatch.setattr(FakeContext, call, lambda *_: answer)
    with pytest.raises(RuntimeError, match=told):
        loaded, _, _, engine = make(toy_manifest, tmp_path, layout="shared")
        loaded.run({"sample": sample("128x128")}, engine.profiles[0])


@pytest.mark.parametrize(
    "layout, asked, strategy", [("ranged", None, "eager"), ("shared", None, "none"), ("ranged", "lazy", "lazy")]
)
def test_rtx_settings_follow_the_layout(
    toy_manifest: Manifest, tmp_path: Path, layout: str, asked: str | None, strategy: str
) -> None:
    loaded, trt, _, engine = make(toy_manifest, tmp_path, "tensorrt-rtx", layout, specialization=asked)
    config = trt.plan.configs[0]
    assert all(context.specialization == "none" for context in trt.plan.contexts), "measuring shapes compiles nothing"
    loaded.run({"sample": sample("128x128")}, engine.profiles[0])
    assert trt.plan.contexts[-1].specialization == strategy
    assert config.dynamic_shapes_kernel_specialization_strategy == strategy
    assert config.cuda_graph_strategy == "whole" and config.allocation == "user" and config.has_cache


def test_header_is_judged_before_the_plan_is_deserialised(toy_manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot run here: version mismatch, old cuda driver; rebuild it"):
        make(toy_manifest, tmp_path, "tensorrt-rtx", header_reasons=5)
    with pytest.raises(UserError, match="cannot run here: old cuda driver; update the NVIDIA driver"):
        make(toy_manifest, tmp_path, "tensorrt-rtx", header_reasons=4)


def test_a_full_gpu_is_an_out_of_memory_error_as_torch_has_it(
    toy_manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the header, by the whole plan, and by a context for another size; a plan that is refused with room left is not."""
    with pytest.raises(torch.OutOfMemoryError, match="finds too little memory free"):
        make(toy_manifest, tmp_path, "tensorrt-rtx", header_reasons=8)
    with pytest.raises(UserError, match="its own message stands above; rebuild it"):
        make(toy_manifest, tmp_path, refuses=True)
    loaded, trt, shared, engine = make(toy_manifest, tmp_path)
    trt.plan.is_full = True

    def give_back() -> int:
        trt.plan.is_full = False
        return 1 << 30

    with monkeypatch.context() as patch:  # what torch held in reserve was enough
        patch.setattr(shared.device, "free_bytes", give_back)
        loaded.run({"sample": sample("96x224")}, engine.profiles[0])
    trt.plan.is_full = True
    with pytest.raises(
        torch.OutOfMemoryError, match=r"gave unet no execution context with 1\.07 GB of the GPU's memory"
    ):
        loaded.run({"sample": sample("128x128")}, engine.profiles[0])
    monkeypatch.setattr(FakeDevice, "free_bytes", lambda self: len(b"plan") - 1)
    with pytest.raises(torch.OutOfMemoryError, match=r"takes 4 B of the GPU's memory, of which 3 B are free"):
        make(toy_manifest, tmp_path, refuses=True)


def test_a_doubtful_gpu_is_decided_by_deserialising(toy_manifest: Manifest, tmp_path: Path) -> None:
    loaded, _, _, engine = make(toy_manifest, tmp_path, "tensorrt-rtx", header_reasons=2)
    assert torch.equal(
        loaded.run({"sample": sample("128x128")}, engine.profiles[0])["out_sample"], sample("128x128", 2)
    )
    with pytest.raises(UserError, match=r"refused unet/.* \(unsupported cc\); its own .* above; rebuild it"):
        make(toy_manifest, tmp_path, "tensorrt-rtx", header_reasons=2, refuses=True)


def test_contexts_go_before_the_settings_and_the_cache_they_use(toy_manifest: Manifest, tmp_path: Path) -> None:
    """TensorRT-RTX does not keep either alive for a context; whichever went first would end the process."""
    loaded, trt, _, engine = make(toy_manifest, tmp_path, "tensorrt-rtx")
    trt.plan.lets_go = True
    loaded.run({"sample": sample("128x128")}, engine.profiles[0])
    (context,) = loaded._contexts.values()
    gone: list[str] = []
    for name, thing in (("context", context._context), ("settings", loaded._config), ("cache", loaded.cache._cache)):
        weakref.finalize(thing, gone.append, name)
    trt.plan.configs.clear()
    del context, thing, loaded
    gc.collect()
    assert gone == ["context", "settings", "cache"]


def test_runtime_cache_is_kept_and_a_damaged_one_ignored(tmp_path: Path) -> None:
    first = KernelCache(tmp_path, "gpu", FakeCache())
    first.save()
    again = FakeCache()
    KernelCache(tmp_path, "gpu", again)
    assert again.loaded == b"compiled"
    path = tmp_path / "gpu.kernels"
    path.write_bytes(path.read_bytes()[:-1] + b"X")
    damaged = FakeCache()
    KernelCache(tmp_path, "gpu", damaged)
    assert damaged.loaded is None


def test_runtime_cache_in_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = KernelCache(tmp_path / "file", "gpu", FakeCache())
    cache.save()


def test_a_dropped_bundle_takes_its_kernels_along(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path, "gpu", FakeCache())
    kernels = weakref.ref(cache._cache)
    del cache
    gc.collect()
    assert kernels() is None, "the wish to save at exit must not hold them"


@pytest.mark.parametrize("flavor", ["tensorrt", "tensorrt-rtx"])
def test_refit_exchanges_weights_and_makes_contexts_anew(
    toy_manifest: Manifest, tmp_path: Path, other_weights: Path, monkeypatch: pytest.MonkeyPatch, flavor: str
) -> None:
    """A graph that was captured before may hold the old weights, and TensorRT-RTX captures its graphs itself."""
    loaded, trt, shared, engine = make(toy_manifest, tmp_path, flavor, built_with={"refit": True})
    loaded.run({"sample": sample("128x128", 1)}, engine.profiles[0])
    weights = weights_for(engine, other_weights)
    assert weights is not None and not weights.is_source_of(engine)
    for number, scale in enumerate((5.0, 2.0, 5.0), 1):
        contexts = len(trt.plan.contexts)
        monkeypatch.setitem(fake_tensorrt.WEIGHTS, "scale", scale)
        loaded.refit(weights)
        result = loaded.run({"sample": sample("128x128", 1)}, engine.profiles[0])["out_sample"]
        assert torch.equal(result, sample("128x128", scale)) and len(trt.plan.contexts) == contexts + 1
        assert shared.device.synchronized == number, "the refitter may go only when its weights have come"  # type: ignore[attr-defined]
    monkeypatch.setattr(FakeRefitter, "get_missing_weights", lambda self: ["conv.weight"])
    with pytest.raises(UserError, match=r"does not fit .*\(without conv\.weight\): export the same architecture"):
        loaded.refit(weights)


def test_a_lora_is_added_to_the_weights_of_its_onnx_file(
    toy_manifest: Manifest, toy_onnx: Path, tmp_path: Path
) -> None:
    """What it adds to is given anew, with what TensorRT fused it with; then what it no longer adds to."""
    loaded, trt, shared, engine = make(toy_manifest, tmp_path, built_with={"refit": True}, weights=toy_onnx)
    plan = trt.plan
    plan.refits.clear()  # the toy's fp32 weights at load
    loaded.run({"sample": sample("128x128")}, engine.profiles[0])
    own = {
        value.name: numpy_helper.to_array(value) for value in onnx.load(toy_onnx / "unet/model.onnx").graph.initializer
    }
    loaded.add_to_weights({"kernel": lambda: torch.ones(4, 4, 3, 3)})
    loaded.add_to_weights({})
    loaded.add_to_weights({})
    added, taken_back = plan.refits
    assert added.keys() == taken_back.keys() == {"kernel", "small"}
    assert np.array_equal(added["kernel"], own["kernel"] + 1) and np.array_equal(added["small"], own["small"])
    assert np.array_equal(taken_back["kernel"], own["kernel"])
    loaded.run({"sample": sample("128x128")}, engine.profiles[0])
    assert shared.device.captures == 2, "a graph may hold the old weights"  # type: ignore[attr-defined]
    for name, line in {"bias": "has no weight bias, to which the LoRA adds", "axes1": "has axes1 in 8 bits"}.items():
        with pytest.raises(UserError, match=line):
            loaded.add_to_weights({name: lambda: torch.ones(1)})
    plan.refittable.remove("kernel")
    with pytest.raises(UserError, match=r"cannot replace kernel in .*: fuse the LoRA before the build"):
        loaded.add_to_weights({"kernel": lambda: torch.ones(4, 4, 3, 3)})


@pytest.mark.parametrize(
    "built_with, line",
    [
        ({}, "built without --refit and keeps its weights: rebuild it"),
        ({"refit": True}, "load\\(bundle, weights=FOLDER"),
    ],
)
def test_a_plan_that_takes_no_lora_says_why(
    toy_manifest: Manifest, tmp_path: Path, built_with: dict[str, bool], line: str
) -> None:
    loaded, *_ = make(toy_manifest, tmp_path, built_with=built_with)
    loaded.add_to_weights({})
    with pytest.raises(UserError, match=line):
        loaded.require_exchangeable()


@pytest.mark.parametrize(
    "built_with, same, outcome",
    [
        ({}, True, 2.0),  # its own weights: nothing to do
        ({}, False, "built without --refit and keeps its own"),
        ({"refit": True}, False, 5.0),
        ({"strip": True}, True, 5.0),
        ({"strip": True}, False, "takes back only the weights it was built from"),
        ({"strip": True, "refit": True}, False, 5.0),
        ({"strip": True}, None, "a plan without weights: name the ONNX folder"),
    ],
)
def test_weights_at_load(
    toy_manifest: Manifest,
    toy_onnx: Path,
    other_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    built_with: dict[str, bool],
    same: bool | None,
    outcome: float | str,
) -> None:
    """A plan without weights takes its own or, with --refit, any; other weights are never taken in silence."""
    monkeypatch.setitem(fake_tensorrt.WEIGHTS, "scale", 5.0)
    folder = {True: toy_onnx, False: other_weights, None: None}[same]
    if isinstance(outcome, str):
        with pytest.raises(UserError, match=outcome):
            make(toy_manifest, tmp_path, built_with=built_with, weights=folder)
        return
    loaded, _, _, engine = make(toy_manifest, tmp_path, built_with=built_with, weights=folder)
    assert torch.equal(
        loaded.run({"sample": sample("128x128")}, engine.profiles[0])["out_sample"], sample("128x128", outcome)
    )
