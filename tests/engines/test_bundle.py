"""The manifest and its verification: whatever is damaged is refused, in one line that says how to rebuild it."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.common.errors import UserError
from distill.common.files import sha256_file
from engines.building.reports import print_inspection
from engines.bundle import Manifest, _inside, read_manifest
from engines.flavors import find_flavor
from engines.integrity import unnamed_files, verify_bundle
from engines.pipeline import load
from engines.selection import choose_flavor, select_engines

DAMAGED_BUNDLES = int(os.environ.get("SLIMXL_DAMAGED_BUNDLES", "2000"))


@pytest.fixture
def bundle(tmp_path: Path, toy_bundle: Path) -> Path:
    """A copy that may be damaged."""
    copy = tmp_path / "bundle"
    shutil.copytree(toy_bundle, copy)
    return copy


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory, toy_bundle: Path) -> Path:
    """A copy that a test damages and mends again."""
    copy = tmp_path_factory.mktemp("scratch") / "bundle"
    shutil.copytree(toy_bundle, copy)
    return copy


def edit(bundle: Path, change: Any) -> None:
    content = json.loads((bundle / "manifest.json").read_text())
    change(content)
    (bundle / "manifest.json").write_text(json.dumps(content))


def all_sizes(engine: Any, sizes: list[str]) -> None:
    engine.update(resolutions=sizes)
    engine["profiles"][0].update(resolutions=sizes)


def set_shape(manifest: Any, name: str, shape: list[int]) -> None:
    manifest["engines"][0]["profiles"][0]["shapes"][name] = dict.fromkeys(("min", "opt", "max"), shape)


def in_hub_cache(bundle: Path, cache: Path) -> Path:
    """The bundle as huggingface_hub lays it out: links to blobs that are called by their hashes."""
    snapshot, blobs = cache / "models--me--bundle" / "snapshots" / "0123abcd", cache / "models--me--bundle" / "blobs"
    blobs.mkdir(parents=True)
    for path in bundle.rglob("*"):
        if path.is_file() and path.name != ".lock":
            blob, link = blobs / sha256_file(path), snapshot / path.relative_to(bundle)
            shutil.copyfile(path, blob)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_bundle_in_a_hub_cache_loads(toy_bundle: Path, tmp_path: Path) -> None:
    """Hashes decide: its links to blobs are followed, one that leads out of the cache is not."""
    snapshot = in_hub_cache(toy_bundle, tmp_path / "hub")
    assert verify_bundle(snapshot) == []
    pipe = load(snapshot, flavor="onnxruntime", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red circle", num_inference_steps=1, width=128, height=128, output_type="np").images
    assert picture.shape == (1, 128, 128, 3)
    link = snapshot / read_manifest(snapshot).engines[0].files[0].path
    outside = shutil.copyfile(link, tmp_path / "outside")
    link.unlink()
    link.symlink_to(outside)
    assert any("leads out of the bundle" in fault for fault in verify_bundle(snapshot))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(schema_version=7), "schema version 7, this slimxl reads 1"),
        (lambda m: m.pop("schema_version"), "schema version None"),
        (lambda m: m.update(schema_version=True), "schema version True"),
        (lambda m: m.update(extra=1), "damaged at extra"),
        (lambda m: m["engines"][0]["files"][0].update(path="../../etc/passwd"), "not a plain relative path"),
        (lambda m: m["engines"][0]["files"][0].update(path="/etc/passwd"), "not a plain relative path"),
        (lambda m: m["engines"][0]["files"][0].update(path="C:/windows"), "not a plain relative path"),
        (lambda m: m["engines"][0]["files"][0].update(path="unet\\x.plan"), "not a plain relative path"),
        (lambda m: m["engines"][0]["files"][0].update(sha256="0"), "damaged at engines.0.files.0.sha256"),
        (lambda m: m["engines"][0]["files"][0].update(size_bytes=-1), "size_bytes"),
        (lambda m: m["engines"][0].update(flavor="pickle"), "damaged at engines.0.flavor"),
        (lambda m: m["engines"][0].update(component="lora"), "engines.0.component: .* known are unet, controlnet"),
        (lambda m: m["source"].update(pipeline="FluxPipeline"), "source.pipeline: .* no pipeline of Stable Diffusion"),
        (lambda m: m["source"].pop("pipeline"), "source.pipeline: field required"),
        (
            lambda m: m["source"].update(pipeline="StableDiffusionPipeline"),
            "StableDiffusionPipeline has no text_encoder_2",
        ),
        (lambda m: m["engines"][0]["build"].update(seconds=math.inf), "build.seconds: input should be a finite number"),
        (lambda m: m["engines"][0]["profiles"][0].update(index=3), "profile 3 at position 0"),
        (lambda m: m["engines"][0]["profiles"][0]["shapes"]["sample"].update(min=[9, 9, 9, 9]), "min <= opt <= max"),
        (lambda m: m["engines"].append(m["engines"][0]), "two records name the same file"),
        (lambda m: m["engines"][0].update(resolutions=["999x999"]), "999x999 are not those of the profiles"),
        (lambda m: m["engines"][0].update(batches=[4]), r"the batches \[4\] are not those of the profiles, \[1\]"),
        (
            lambda m: all_sizes(m["engines"][0], ["999x999"]),
            "profile 0 takes pictures of .*, not 999x999",
        ),
        (lambda m: all_sizes(m["engines"][0], ["64x64", "128x128"]), "profile 0 takes pictures of"),
        (lambda m: m["engines"][0]["profiles"][0].update(batch=9), "batches"),
        (lambda m: m["engines"][0]["profiles"][0].update(shapes={}), "shapes"),
        (lambda m: set_shape(m, "sample", [1, 4, 12]), "input sample is"),
        (lambda m: set_shape(m, "encoder_hidden_states", [1, 5, 64]), "input encoder_hidden_states is"),
        (lambda m: set_shape(m, "sample", []), "differ in rank, or have none"),
    ],
)
def test_damaged_manifest_is_refused(bundle: Path, change: Any, message: str) -> None:
    edit(bundle, change)
    with pytest.raises(UserError, match=message) as caught:
        read_manifest(bundle)
    assert "python -m engines build" in str(caught.value) and "\n" not in str(caught.value)


def emptied(value: Any) -> Iterator[Any]:
    """The JSON value with each part of it emptied in turn."""
    yield type(value)()
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        for other in emptied(part) if part is not None else ():
            yield {**value, key: other} if isinstance(value, dict) else [*value[:key], other, *value[key + 1 :]]


def test_what_is_empty_is_refused_or_harmless(bundle: Path) -> None:
    content = json.loads((bundle / "manifest.json").read_text())
    first, *others = content["engines"][:4]
    refused = harmless = 0
    for engine in emptied(first):
        (bundle / "manifest.json").write_text(json.dumps(content | {"engines": [engine, *others]}))
        try:
            manifest = read_manifest(bundle)
            print_inspection(bundle)
            select_engines(manifest, find_flavor("onnxruntime"), "cpu")
            harmless += 1
        except UserError:
            refused += 1
    assert refused > 100 and harmless > 10


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '"\ud800"', "nul\0"])
def test_text_that_is_no_manifest_is_refused(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError):
        read_manifest(bundle)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a bundle \(no manifest.json\); build it with"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("outside", "leads out of the bundle"), ("nothing", "leads out of the bundle"), ("circle", "is missing")],
)
def test_a_link_that_leads_nowhere_or_out_is_refused(bundle: Path, tmp_path: Path, name: str, message: str) -> None:
    path = bundle / read_manifest(bundle).engines[0].files[0].path
    shutil.copyfile(path, tmp_path / "outside")
    path.unlink()
    path.symlink_to(path if name == "circle" else tmp_path / name)
    assert any(message in fault for fault in verify_bundle(bundle))


def test_a_file_without_a_hash_is_not_read(bundle: Path) -> None:
    """One that was slipped in, and one whose record was taken out of the manifest."""
    (bundle / "tokenizer" / "tokenizer.json").write_text("{}")
    edit(bundle, lambda m: m.update(files=[r for r in m["files"] if r["path"] != "unet/config.json"]))
    faults = unnamed_files(bundle, read_manifest(bundle))
    assert [fault.split(" ")[0] for fault in faults] == ["unet/config.json", "tokenizer/tokenizer.json"]
    with pytest.raises(UserError, match=r"unet/config.json is not named by the manifest .* python -m engines build"):
        load(bundle, flavor="onnxruntime")


def test_missing_foreign_and_truncated_files_are_named(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    plans = [engine for engine in manifest.engines if engine.flavor == "tensorrt-rtx"]
    (bundle / plans[0].files[0].path).unlink()
    shutil.copyfile(bundle / plans[2].files[0].path, bundle / plans[1].files[0].path)
    os.truncate(bundle / plans[3].files[0].path, 100)
    faults = verify_bundle(bundle)
    assert len(faults) == 3
    assert "is missing from" in faults[0]
    assert "bytes, the manifest says" in faults[1] and "has 100 bytes" in faults[2]
    for fault in faults:
        assert "--flavor tensorrt-rtx --layout ranged --gpus a100,rtx4090" in fault


@st.composite
def damage(draw: st.DrawFn) -> tuple[str, float, Any]:
    """What is done to a file, where (as a fraction of it), and with what."""
    kind = draw(st.sampled_from(["flip", "truncate", "append", "zero", "swap", "remove", "empty"]))
    return kind, draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 255))


def _apply(path: Path, other: Path, kind: str, where: float, value: int) -> None:
    data = path.read_bytes()
    at = int(where * len(data))
    match kind:
        case "flip":
            path.write_bytes(data[:at] + bytes([data[at] ^ value]) + data[at + 1 :])
        case "truncate":
            path.write_bytes(data[:at])
        case "append":
            path.write_bytes(data + bytes([value]))
        case "zero":
            path.write_bytes(data[:at] + bytes(len(data) - at) + b"\0")
        case "swap":
            path.write_bytes(other.read_bytes())
        case "remove":
            path.unlink()
        case "empty":
            path.write_bytes(b"")


@settings(max_examples=DAMAGED_BUNDLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), damage())
def test_every_damaged_file_is_found(scratch: Path, data: st.DataObject, how: tuple[str, float, Any]) -> None:
    """Over thousands of damaged bundles: exactly the damaged file is named, and nothing is opened."""
    records = read_manifest(scratch).all_files
    record = data.draw(st.sampled_from(records))
    other = data.draw(st.sampled_from([r for r in records if r.sha256 != record.sha256]))
    path = scratch / record.path
    original = path.read_bytes()
    try:
        _apply(path, scratch / other.path, *how)
        faults = verify_bundle(scratch)
        assert len(faults) == 1 and faults[0].startswith(record.path), faults
    finally:
        path.write_bytes(original)


@settings(max_examples=DAMAGED_BUNDLES // 2, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.floats(0, 1, exclude_max=True), st.sampled_from(["flip", "truncate", "append"]), st.integers(1, 255))
def test_every_damaged_manifest_is_refused_or_harmless(scratch: Path, where: float, kind: str, value: int) -> None:
    """A changed manifest is refused with one line, or still describes this very bundle, or its hashes show it."""
    path = scratch / "manifest.json"
    original = path.read_bytes()
    intact = read_manifest(scratch)
    try:
        _apply(path, path, kind, where, value)
        try:
            manifest = read_manifest(scratch)
        except UserError as error:
            assert "\n" not in str(error)
            return
        for record in manifest.all_files:
            assert (scratch / record.path).resolve().is_relative_to(scratch.resolve())
        same_files = {r.path: r.sha256 for r in manifest.all_files} == {r.path: r.sha256 for r in intact.all_files}
        assert same_files or verify_bundle(scratch)
    finally:
        path.write_bytes(original)


@given(st.text(min_size=1, max_size=40))
def test_paths_that_climb_are_never_inside(text: str) -> None:
    for path in (f"../{text}", f"{text}/../../x", f"/{text}", f"a\\..\\{text}", f"{text}/.."):
        with pytest.raises(ValueError):
            _inside(path)


def test_hash_is_compared_before_anything_is_deserialised(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    engine = next(e for e in read_manifest(bundle).engines if e.flavor == "onnxruntime" and e.component == "unet")
    path = bundle / engine.files[-1].path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)
    opened = []
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: opened.append(a[0]) or real(*a, **k))
    with pytest.raises(UserError, match=r"has sha256 .* the manifest says .* rebuild it with: python -m engines build"):
        load(bundle, flavor="onnxruntime")
    assert not any("unet" in path for path in opened)


def test_no_two_plans_that_serve_the_same_are_loaded(toy_manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    from engines.flavors import find_flavor, tensorrt

    monkeypatch.setattr(tensorrt, "gpu_of_device", lambda device: ("NVIDIA A100", "8.0"))
    flavor = find_flavor("tensorrt-rtx")
    unet = next(e for e in toy_manifest.engines if e.flavor == "tensorrt-rtx" and e.component == "unet")
    profile = unet.profiles[0]

    def variant(layout: str, *sizes: str) -> Any:
        profiles = [profile.model_copy(update={"resolutions": list(sizes)})]
        return unet.model_copy(update={"layout": layout, "resolutions": list(sizes), "profiles": profiles})

    def chosen(*variants: Any, layout: Any = None, with_weights: bool = False, precision: Any = None) -> list[Any]:
        others = [e for e in toy_manifest.engines if e.component != "unet"]
        manifest = toy_manifest.model_copy(update={"engines": [*others, *variants]})
        return select_engines(manifest, flavor, "cuda:0", layout, with_weights, precision)["unet"]

    ranged, shared = variant("ranged", "128x128", "224x96"), variant("shared", "128x128", "224x96")
    static = [variant("per-resolution", size) for size in ("128x128", "224x96", "96x224")]
    assert chosen(shared, ranged) == [ranged]
    assert chosen(shared, ranged, layout="shared") == [shared]
    assert chosen(shared, ranged, *static) == static, "the layout that serves most sizes"
    assert chosen(variant("ranged", "128x128"), ranged, ranged) == [ranged]
    wide = {name: shape.model_copy(update={"max": [8, *shape.max[1:]]}) for name, shape in profile.shapes.items()}
    four = ranged.profiles[0].model_copy(update={"batch": 4, "shapes": wide})
    for_four = ranged.model_copy(update={"batches": [4], "profiles": [four]})
    assert chosen(ranged, for_four) == chosen(for_four, ranged) == [for_four], "what takes four images takes one"
    later = ranged.model_copy(update={"key": "0" * 64})
    assert chosen(ranged, later) == [later], "of two alike, the newer"
    refit, stripped = (ranged.model_copy(update={"options": {name: True}}) for name in ("refit", "strip"))
    assert chosen(refit, ranged) == [ranged] == chosen(ranged, stripped)
    assert chosen(ranged, refit, shared, with_weights=True) == [refit] == chosen(refit, ranged, with_weights=True)
    assert chosen(stripped) == [stripped], "refused with a reason when it is loaded"
    with pytest.raises(UserError, match="no engine in layout shared, it has ranged"):
        chosen(ranged, layout="shared")
    small = ranged.model_copy(update={"precision": "int8", "key": "1" * 64})
    assert chosen(ranged, small) == chosen(small, ranged) == [ranged] and chosen(small) == [small]
    assert chosen(ranged, small, precision="int8") == [small]
    with pytest.raises(UserError, match=r"unet is in fp16, int8, not in fp8; .* export quantise --precision fp8"):
        chosen(ranged, small, precision="fp8")


@pytest.mark.parametrize(
    "gpu, version, message",
    [
        (None, None, "found no GPU or no driver"),
        (
            ("NVIDIA A100", "8.0"),
            "driver",
            "made for CUDA 13, driver 550.54 runs CUDA 12 at most; update the NVIDIA driver",
        ),
        (
            ("NVIDIA H100", "9.0"),
            None,
            r"8.0, 8.9 .* this GPU is NVIDIA H100 with 9.0; .* --flavor tensorrt --.* --gpus auto",
        ),
        (("NVIDIA RTX 5090", "12.0"), None, r"this GPU is NVIDIA RTX 5090 with 12.0; .*tensorrt-rtx --.* --gpus auto"),
        (("NVIDIA A100", "8.0"), "1.2.3.4", "built by tensorrt-rtx 1.2.3.4, installed is"),
        (("NVIDIA A100", "8.0"), None, None),
        (("NVIDIA L40S", "8.9"), None, None),
    ],
)
def test_gpu_and_version_are_checked_before_files(
    toy_manifest: Manifest, monkeypatch: pytest.MonkeyPatch, gpu: Any, version: str | None, message: str | None
) -> None:
    from engines.flavors import find_flavor, tensorrt

    monkeypatch.setattr(tensorrt, "gpu_of_device", lambda device: gpu)
    driver = ("550.54", 12) if version == "driver" else ("580.65", 13)
    monkeypatch.setattr(tensorrt, "driver_at_hand", lambda: driver)
    if version and version != "driver":
        engines = [engine.model_copy(update={"flavor_version": version}) for engine in toy_manifest.engines]
        toy_manifest = toy_manifest.model_copy(update={"engines": engines})
    else:
        assert find_flavor("tensorrt-rtx").cuda_major() == 13  # type: ignore[attr-defined]
    if message is None:
        assert len(select_engines(toy_manifest, find_flavor("tensorrt-rtx"), "cuda:0")) == 4
        return
    with pytest.raises(UserError, match=message):
        select_engines(toy_manifest, find_flavor("tensorrt-rtx"), "cuda:0")


def test_a_plan_is_not_for_the_cpu_even_where_there_is_a_gpu(
    toy_manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engines.flavors import find_flavor, tensorrt

    monkeypatch.setattr(tensorrt, "gpu_of_device", lambda device: ("NVIDIA A100", "8.0"))
    monkeypatch.setattr(tensorrt, "driver_at_hand", lambda: None)
    assert choose_flavor(toy_manifest, None, "cuda").name == "tensorrt-rtx"
    assert choose_flavor(toy_manifest, None, "cpu").name == "onnxruntime"
    with pytest.raises(UserError, match="tensorrt-rtx engines run on a GPU, not on device cpu"):
        select_engines(toy_manifest, find_flavor("tensorrt-rtx"), "cpu")


def test_the_gpu_that_is_checked_is_the_one_that_torch_loads_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA may number GPUs from the fastest, NVML never does."""
    import torch

    from engines.gpus import gpu_of_device

    found = {"cuda": ("RTX 4090", (8, 9)), "cuda:0": ("RTX 4090", (8, 9)), "cuda:1": ("A10", (8, 6))}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: found[device][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found[device][1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu_of_device("cuda") == gpu_of_device("cuda:0") == ("RTX 4090", "8.9")
    assert gpu_of_device("cuda:1") == ("A10", "8.6") and gpu_of_device("cuda:2") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_of_device("cuda:0") is None


def test_a_plan_for_ampere_and_newer_serves_them_all(toy_manifest: Manifest) -> None:
    plan = toy_manifest.engines[-1].model_copy(update={"compute_capabilities": ["8.6"]})
    every = plan.model_copy(update={"options": {"hardware_compatible": "ampere+"}})
    capabilities = ("7.5", "8.0", "8.6", "8.9", "12.0")
    assert [plan.serves(capability) for capability in capabilities] == [False, False, True, False, False]
    assert [every.serves(capability) for capability in capabilities] == [False, True, True, True, True]
    assert all(toy_manifest.engines[0].serves(capability) for capability in capabilities), "ONNX Runtime is for any"


def test_a_compatible_plan_is_for_newer_versions_by_number(
    toy_manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engines.flavors import tensorrt

    monkeypatch.setattr(tensorrt, "gpu_of_device", lambda device: ("NVIDIA A100", "8.0"))
    monkeypatch.setattr(tensorrt, "driver_at_hand", lambda: None)
    flavor = tensorrt.make("tensorrt")
    plan = toy_manifest.engines[-1].model_copy(
        update={"flavor": "tensorrt", "flavor_version": "10.9.0", "options": {"version_compatible": True}}
    )
    monkeypatch.setattr(tensorrt.TensorRTFlavor, "version", lambda self: "10.14.1")
    flavor.check_load(plan, "cuda:0")
    monkeypatch.setattr(tensorrt.TensorRTFlavor, "version", lambda self: "10.8.0")
    with pytest.raises(UserError, match=r"built by tensorrt 10.9.0, installed is 10.8.0"):
        flavor.check_load(plan, "cuda:0")


@pytest.mark.parametrize(
    "board, options, doubted",
    [
        ("NVIDIA A10", {}, False),
        ("NVIDIA GeForce RTX 3090", {}, True),
        ("NVIDIA GeForce RTX 3090", {"hardware_compatible": "same"}, False),
    ],
)
def test_a_plan_that_was_tuned_on_another_board_is_doubted(
    toy_manifest: Manifest, monkeypatch: pytest.MonkeyPatch, board: str, options: dict[str, str], doubted: bool
) -> None:
    from engines.flavors import tensorrt

    monkeypatch.setattr(tensorrt, "gpu_of_device", lambda device: (board, "8.6"))
    plan = toy_manifest.engines[-1].model_copy(update={"gpus": ["a10"], "options": options})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tensorrt.make("tensorrt").doubt_board(plan, "cuda:0")
        tensorrt.make("tensorrt-rtx").doubt_board(plan, "cuda:0")
    assert ["tuned on NVIDIA A10, this GPU is" in str(one.message) for one in told] == [True] * doubted


def test_onnx_runtime_with_cuda_and_no_gpu_stays_on_the_cpu(
    toy_manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its providers are what it was compiled with, not what works."""
    import onnxruntime

    from engines.flavors import onnxruntime as module

    flavor = module.make("onnxruntime")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(module, "gpu_of_device", lambda device: None)
    assert flavor.default_device() == "cpu"
    with pytest.raises(UserError, match="device cuda:1: no such NVIDIA GPU answers here; use device cpu"):
        flavor.check_load(toy_manifest.engines[0], "cuda:1")
    monkeypatch.setattr(module, "gpu_of_device", lambda device: ("NVIDIA A100", "8.0"))
    assert flavor.default_device() == "cuda:0"
    flavor.check_load(toy_manifest.engines[0], "cuda:1")


def test_a_missing_onnx_runtime_is_said(toy_manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    flavor = find_flavor("onnxruntime")
    for ask in (flavor.default_device, lambda: flavor.check_load(toy_manifest.engines[0], "cpu")):
        with pytest.raises(UserError, match=r"onnxruntime cannot be imported .*pip install onnxruntime"):
            ask()


@pytest.mark.parametrize(
    "visible, position, asked",
    [
        (None, 1, 1),
        ("3,GPU-abc", 0, 3),
        ("3,GPU-abc", 1, "GPU-abc"),
        ("3", 1, None),
        ("", 0, None),
        ("-1", 0, None),
        ("0,-1,2", 1, None),
    ],
)
def test_the_gpu_is_the_one_that_cuda_sees(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, position: int, asked: int | str | None
) -> None:
    import pynvml

    from engines.gpus import gpu_at_hand

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    for name in ("nvmlDeviceGetHandleByIndex", "nvmlDeviceGetHandleByUUID"):
        monkeypatch.setattr(pynvml, name, lambda which: which)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", lambda handle: (8, 9))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda handle: f"GPU {handle}")
    assert gpu_at_hand(position) == (None if asked is None else (f"GPU {asked}", "8.9"))
