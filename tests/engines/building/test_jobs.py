"""The jobs of a build: names, keys, and memory against the figures of real builds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.common.errors import UserError
from distill.common.files import sha256_file
from distill.models.families import MINI_FAMILY
from engines.building.build import _timing_name
from engines.building.contents import without_superseded
from engines.building.jobs import Job, list_jobs, require_memory, require_vram
from engines.building.options import builder_options
from engines.bundle import Manifest, ShapeRange
from engines.choices import Layout
from engines.flavors import find_flavor
from engines.gpus import GPUS, resolve_targets
from engines.onnx_folder import OnnxComponent, read_onnx_folder
from tests.engines.toys import make_static, make_toy_onnx

RTX = frozenset({"7.5", "8.0", "8.6", "8.9", "12.0", "12.1"})


def jobs_of(folder: Path, **change: object) -> list[Job]:
    gpus = [] if change.get("flavor") == "onnxruntime" else ["rtx4090"]
    settings = {"gpus": gpus, "flavor": "tensorrt-rtx"} | change
    return list_jobs(read_onnx_folder(folder), **settings)  # type: ignore[arg-type]


def test_targets() -> None:
    (one,) = resolve_targets(["rtx4090", "a100", "l40s"], "tensorrt-rtx", RTX)
    assert one.compute_capabilities == ("8.0", "8.9") and one.gpus == ("a100", "rtx4090", "l40s")
    assert one.label == "sm80-sm89"
    each = resolve_targets(["rtx4090", "a100"], "tensorrt", frozenset({"8.0", "8.9"}))
    assert [target.label for target in each] == ["sm80", "sm89"]
    (portable,) = resolve_targets(["rtx"], "tensorrt-rtx", RTX)
    assert portable.compute_capabilities == ("8.6", "8.9", "12.0")
    assert resolve_targets(["auto"], "onnxruntime", None)[0].label == "any"
    with pytest.raises(UserError, match="run on any machine: leave out --gpus a100"):
        resolve_targets(["a100"], "onnxruntime", None)


@pytest.mark.parametrize("name", ["h100", "h200"])
def test_gpu_that_rtx_cannot_target(name: str) -> None:
    with pytest.raises(UserError, match=rf"cannot target {name} .* use --flavor onnxruntime"):
        resolve_targets([name], "tensorrt-rtx", RTX)
    assert GPUS[name].compute_capability == "9.0"
    with pytest.raises(UserError, match=rf"cannot target {name} .*: it targets 8\.0; use --flavor onnxruntime"):
        resolve_targets([name], "tensorrt", frozenset({"8.0"}))  # not advised: what has just refused


def test_key_changes_with_everything_an_engine_depends_on(toy_onnx_fp16: Path) -> None:
    changes = [
        {},
        {"gpus": ["a100"]},
        {"layout": "shared"},
        {"resolutions": "128x128"},
        {"batches": [2]},
        {"options": {"weight_streaming": True}},
        {"flavor": "onnxruntime"},
    ]
    jobs = [jobs_of(toy_onnx_fp16, **change)[0] for change in changes]
    assert len({job.key for job in jobs}) == len(jobs) == len({job.path for job in jobs})
    assert jobs_of(toy_onnx_fp16)[0].key == jobs[0].key
    assert jobs_of(toy_onnx_fp16, gpus=["l40s"])[0].key == jobs[0].key, "same silicon, same plan"


def test_file_name_says_what_it_is(toy_onnx_fp16: Path) -> None:
    job = jobs_of(toy_onnx_fp16, gpus=["a100", "rtx5090"], layout="shared", resolutions="224x96", batches=[1, 4])[0]
    assert job.path.startswith(f"unet/unet_224x96_b1-4_sm80-sm120_tensorrt-rtx-{job.flavor_version}_")
    assert job.path.endswith(f"_{job.key[:8]}.plan")


@pytest.mark.parametrize("layout, plans", [("per-resolution", 9), ("shared", 1), ("ranged", 1)])
def test_every_layout_covers_every_size_and_batch(toy_onnx_fp16: Path, layout: Layout, plans: int) -> None:
    jobs = jobs_of(toy_onnx_fp16, layout=layout, batches=[1, 2], guidance="any", components=["unet"])
    assert len(jobs) == plans
    for resolution in MINI_FAMILY.resolutions:
        for rows in (1, 2, 4):  # one image with and without guidance, two images with it
            shape = [rows, 4, resolution.height // 8, resolution.width // 8]
            call = ShapeRange(min=shape, opt=shape, max=shape)
            serving = [
                profile
                for job in jobs
                for profile in job.profiles
                if str(resolution) in profile.resolutions and profile.shapes["sample"].covers(call)
            ]
            assert serving, (layout, resolution, rows)


@pytest.mark.parametrize("change", [{"resolutions": "224x96"}, {"layout": "shared"}, {"layout": "per-resolution"}])
def test_text_encoders_are_the_same_whatever_sizes_are_asked_for(toy_onnx_fp16: Path, change: dict) -> None:
    """So one more size does not build, keep and load them again."""
    components = ["text_encoder", "text_encoder_2"]
    keys = [[job.key for job in jobs_of(toy_onnx_fp16, components=components, **asked)] for asked in ({}, change)]
    assert keys[0] == keys[1] and len(keys[0]) == 2


@pytest.mark.parametrize("guidance, rows", [("always", (4, 4)), ("never", (2, 2)), ("any", (2, 4))])
def test_exact_profiles_are_exact_in_batch_too(toy_onnx_fp16: Path, guidance: str, rows: tuple[int, int]) -> None:
    (job,) = jobs_of(toy_onnx_fp16, layout="shared", batches=[2], guidance=guidance, components=["unet"])
    for profile in job.profiles:
        assert (profile.shapes["sample"].min[0], profile.shapes["sample"].max[0]) == rows
        assert profile.shapes["sample"].min[1:] == profile.shapes["sample"].max[1:]
    (ranged,) = jobs_of(toy_onnx_fp16, layout="ranged", batches=[2], guidance=guidance, components=["unet"])
    shape = ranged.profiles[0].shapes["sample"]
    assert (shape.min[0], shape.max[0]) == (1, rows[1])


def test_static_graphs_make_a_plan_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr("distill.common.files.sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    sizes = ["128x128", "160x128", "224x96"]
    folder = make_static(make_toy_onnx(tmp_path / "onnx", "fp16"), sizes, batch=2)
    jobs = jobs_of(folder)
    assert [(job.component.name, job.resolutions) for job in jobs[:6]] == [
        (name, [size]) for name in ("unet", "vae_decoder") for size in sizes
    ]
    assert [job.component.graph for job in jobs[:3]] == ["model.onnx", "model.160x128.onnx", "model.224x96.onnx"]
    assert len({job.component.onnx_sha256 for job in jobs[:3]}) == 3
    assert len({job.key for job in jobs}) == len(jobs)
    assert len(hashed) == len(set(hashed)) == 8 + 4, "graphs, and each file of weights once for all sizes"
    assert jobs[2].profiles[0].shapes["sample"].min == [2, 4, 12, 28] and jobs[2].component.fixed_rows == 2
    assert [job.component.name for job in jobs[6:]] == ["text_encoder", "text_encoder_2"]
    for change, message in [
        ({"layout": "shared"}, r"a static graph for each resolution, layout shared needs .* --resolutions dynamic"),
        ({"layout": "ranged"}, "layout ranged needs"),
        ({"flavor": "onnxruntime"}, "flavor onnxruntime needs"),
        ({"resolutions": "128x160"}, "128x160 is not one of this model's: 128x128, 160x128, 224x96"),
        ({"batches": [2]}, r"exported for 2 row\(s\), 2 image\(s\) make 4; export with --batch 2"),
    ]:
        with pytest.raises(UserError, match=message):
            jobs_of(folder, **change)


@pytest.mark.parametrize(
    "weights_gb, profiles, measured_gb",
    [(1.49, 1, 4.9), (1.49, 9, 6.0), (2.663, 1, 8.3), (2.663, 9, 9.5), (5.135, 1, 15.6), (5.135, 9, 18.2)],
)
def test_memory_estimate_is_above_what_was_measured_but_not_by_much(
    toy_onnx_fp16: Path, weights_gb: float, profiles: int, measured_gb: float
) -> None:
    job = jobs_of(toy_onnx_fp16, layout="shared")[0]
    component = OnnxComponent("unet", job.component.folder, job.component.config)
    component.__dict__["weights_bytes"] = int(weights_gb * 1e9)
    sized = Job(**{**job.__dict__, "component": component, "profiles": job.profiles[:profiles]})
    assert measured_gb <= sized.memory_bytes / 1e9 <= 1.15 * measured_gb
    with pytest.raises(UserError, match=r"needs about .* GB of memory"):
        require_memory([sized], int(sized.memory_bytes * 0.9))
    require_memory([sized], sized.memory_bytes)


def test_timings_are_kept_by_board_and_every_capability_is_targeted(
    toy_onnx_fp16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Boards of one capability choose other kernels."""
    job = jobs_of(toy_onnx_fp16)[0]
    names = set()
    for board in ("NVIDIA A10", "NVIDIA GeForce RTX 3090"):
        monkeypatch.setattr("engines.building.build.gpu_at_hand", lambda board=board: (board, "8.6"))
        names.add(_timing_name(job))
    assert len(names) == 2
    assert find_flavor("tensorrt").targets >= {"10.0", "10.3", "12.0", "12.1"}  # type: ignore[operator]


def test_tensorrt_is_held_to_its_own_figures(toy_onnx_fp16: Path) -> None:
    """Not to TensorRT-RTX's, which takes nothing of a GPU and little before the weights."""
    rtx = jobs_of(toy_onnx_fp16)[0]
    component = OnnxComponent("unet", rtx.component.folder, rtx.component.config)
    component.__dict__["weights_bytes"] = int(5.136e9)
    rtx, own = (Job(**{**rtx.__dict__, "component": component, "flavor": one}) for one in ("tensorrt-rtx", "tensorrt"))
    assert own.memory_bytes == 2_200_000_000 + 3 * 5_136_000_000 != rtx.memory_bytes
    require_vram([own], 5_736_000_000)
    require_vram([rtx], 0)
    with pytest.raises(
        UserError, match=r"takes 5\.74 GB of the GPU's memory at the least, 5\.7 GB are free: end what else"
    ):
        require_vram([own], 5_700_000_000)


@pytest.mark.parametrize(
    "flavor, chosen, message",
    [
        ("tensorrt-rtx", {"version_compatible": True}, "belong to --flavor tensorrt"),
        ("tensorrt-rtx", {"hardware_compatible": "ampere+"}, "--gpus rtx"),
        ("tensorrt-rtx", {"refit": True}, "need a GPU while building"),
        ("tensorrt-rtx", {"strip": True}, "need a GPU while building"),
    ],
)
def test_options_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, flavor: str, chosen: dict[str, object], message: str
) -> None:
    monkeypatch.setattr("engines.building.options.gpu_at_hand", lambda: None)
    with pytest.raises(UserError, match=message):
        builder_options(flavor, **chosen)  # type: ignore[arg-type]


def test_options_that_are_off_leave_no_trace() -> None:
    assert builder_options("tensorrt") == {}
    assert builder_options("tensorrt", refit=True, hardware_compatible="same") == {
        "refit": True,
        "hardware_compatible": "same",
    }


def _say_quantised(folder: Path, precision: str) -> Path:
    """The toy with a UNet that says that it is in 8 bits."""
    path = folder / "unet" / "export.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantised": {"precision": precision}}))
    return folder


def test_fp8_is_refused_for_a_gpu_without_it_and_int8_is_for_all(tmp_path: Path) -> None:
    fp8 = _say_quantised(make_toy_onnx(tmp_path / "fp8", "fp16"), "fp8")
    with pytest.raises(UserError, match=r"fp8 needs .* 8.9 or later, a100 has 8.0: take int8"):
        jobs_of(fp8, gpus=["a100", "rtx4090"])
    assert len(jobs_of(fp8, gpus=["a100"], components=["vae_decoder"])) == 1
    assert jobs_of(fp8)[0].component.weights_precision == "fp8"
    int8 = _say_quantised(make_toy_onnx(tmp_path / "int8", "fp16"), "int8")
    unet, decoder = jobs_of(int8, gpus=["a100", "rtx4090"])[:2]
    assert unet.component.weights_precision == "int8" and decoder.component.weights_precision == "fp32"


def test_8_bits_stand_beside_fp16_and_supersede_only_their_own(
    toy_manifest: Manifest, toy_bundle: Path, tmp_path: Path
) -> None:
    jobs = jobs_of(_say_quantised(make_toy_onnx(tmp_path / "int8", "fp16", seed=1), "int8"), components=["unet"])
    before = next(e for e in toy_manifest.engines if e.flavor == "tensorrt-rtx" and e.component == "unet")
    older = before.model_copy(update={"precision": "int8"})
    assert without_superseded([before, older], jobs, toy_bundle) == [before]
