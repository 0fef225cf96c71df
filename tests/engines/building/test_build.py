"""Building: what is built, kept, replaced, refused; and that a build killed at any moment leaves a sound bundle."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx
import pytest

from distill.common.errors import UserError
from distill.models.families import MINI_FAMILY
from engines.__main__ import main
from engines.building import build as build_room
from engines.building.build import build_bundle
from engines.bundle import Manifest, read_manifest, rebuild_command
from engines.integrity import unnamed_files, verify_bundle
from engines.memory import available_memory_bytes
from tests.engines.toys import make_static, make_toy_onnx

REPOSITORY = Path(__file__).resolve().parents[3]
UNET_AT_TWO_SIZES: dict[str, Any] = {"resolutions": "128x128,224x96", "components": ["unet"]}


def _command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "engines", *map(str, arguments)]


def test_builds_every_component_for_both_gpus_in_one_plan(toy_manifest: Manifest) -> None:
    plans = [engine for engine in toy_manifest.engines if engine.flavor == "tensorrt-rtx"]
    assert [engine.component for engine in plans] == ["unet", "vae_decoder", "text_encoder", "text_encoder_2"]
    for engine in plans:
        assert engine.compute_capabilities == ["8.0", "8.9"]
        assert engine.gpus == ["a100", "rtx4090"]
        assert len(engine.resolutions) == 9
        name = engine.files[0].path
        assert name.startswith(f"{engine.component}/") and "sm80-sm89" in name and engine.flavor_version in name


def test_outputs_that_no_sampler_reads_are_not_in_the_plan(toy_manifest: Manifest) -> None:
    outputs = {
        (engine.flavor, engine.component): [tensor.name for tensor in engine.outputs] for engine in toy_manifest.engines
    }
    for flavor in ("tensorrt-rtx", "onnxruntime"):
        assert outputs[flavor, "text_encoder"] == ["hidden_states.2"]
        assert outputs[flavor, "text_encoder_2"] == ["text_embeds", "hidden_states.2"]


def test_second_build_does_nothing(toy_bundle: Path, toy_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (toy_bundle / "manifest.json").read_bytes()
    stamp = (toy_bundle / "manifest.json").stat().st_mtime_ns
    monkeypatch.setattr(build_room, "run_worker", lambda *_: pytest.fail("built again"))
    build_bundle(toy_onnx, toy_bundle, gpus=[], flavor="onnxruntime")
    assert (toy_bundle / "manifest.json").read_bytes() == before
    assert (toy_bundle / "manifest.json").stat().st_mtime_ns == stamp


def test_damaged_engine_is_built_again_and_only_that(tmp_path: Path, toy_bundle: Path, toy_onnx_fp16: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(toy_bundle, bundle)
    before = read_manifest(bundle)
    victim = next(e for e in before.engines if e.flavor == "tensorrt-rtx" and e.component == "text_encoder")
    path = bundle / victim.files[0].path
    stamps = {record.path: (bundle / record.path).stat().st_mtime_ns for record in before.all_files}
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    build_bundle(toy_onnx_fp16, bundle, gpus=["a100", "rtx4090"], flavor="tensorrt-rtx")
    assert verify_bundle(bundle) == []
    changed = {name for name, stamp in stamps.items() if (bundle / name).stat().st_mtime_ns != stamp}
    assert changed == {victim.files[0].path}


def test_new_weights_supersede_the_old_engine(tmp_path: Path, toy_bundle: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(toy_bundle, bundle)
    old = {engine.files[0].path for engine in read_manifest(bundle).engines if engine.flavor == "onnxruntime"}
    manifest = build_bundle(make_toy_onnx(tmp_path / "onnx", seed=1), bundle, gpus=[], flavor="onnxruntime")
    new = {engine.files[0].path for engine in manifest.engines if engine.flavor == "onnxruntime"}
    assert len(new) == 4 and not new & old
    assert not any((bundle / path).exists() for path in old)
    assert verify_bundle(bundle) == []


def test_a_build_leaves_the_onnx_folder_readable(tmp_path: Path) -> None:
    """onnx reads no weights that have a second hard link, and neither does polygraphy."""
    folder = make_toy_onnx(tmp_path / "onnx")
    build_bundle(folder, tmp_path / "bundle", gpus=[], flavor="onnxruntime")
    weights = [*folder.rglob("*.data"), *(tmp_path / "bundle").rglob("*.data")]
    assert len(weights) == 8 and all(path.stat().st_nlink == 1 for path in weights)
    for graph in [*folder.glob("*/model.onnx"), *(tmp_path / "bundle").glob("*/*/model.onnx")]:
        onnx.load(graph)
    polygraphy = Path(sys.executable).with_name("polygraphy")
    inspect = [sys.executable, polygraphy, "inspect", "model", folder / "unet" / "model.onnx"]
    told = subprocess.run(inspect, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr


@pytest.mark.parametrize("victim", ["model.onnx", "model.onnx.data"])
def test_an_onnx_folder_that_was_changed_is_refused(tmp_path: Path, victim: str) -> None:
    folder = make_toy_onnx(tmp_path / "onnx")
    path = folder / "unet" / victim
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{victim} has changed since it was exported: .* export again"):
        build_bundle(folder, tmp_path / "bundle", gpus=[], flavor="onnxruntime")
    (folder / "unet" / "export.json").unlink()
    with pytest.raises(UserError, match=r"has no export.json, .* export unet again"):
        build_bundle(folder, tmp_path / "bundle", gpus=[], flavor="onnxruntime")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("slimxl.json", {"resolutions": None}),
        ("slimxl.json", {"resolutions": [1]}),
        ("slimxl.json", {"resolutions": []}),
        ("slimxl.json", {"source": None}),
        ("slimxl.json", {"source": [1]}),
        ("slimxl.json", {"source": {"name": ["a"], "sha256": None}}),
        ("slimxl.json", {"precision": 3}),
        ("model_index.json", []),
        ("unet/config.json", []),
        ("unet/export.json", []),
        ("unet/export.json", {"graphs": ["a"]}),
        ("unet/export.json", {"graphs": {"128x128": 3}}),
        ("unet/export.json", {"graphs": {"128x128": "../../x.onnx"}}),
        ("unet/export.json", {"sha256": {}}),
    ],
    ids=str,
)
def test_what_an_onnx_folder_cannot_say_of_itself_is_one_line(tmp_path: Path, file: str, change: object) -> None:
    folder = make_toy_onnx(tmp_path / "onnx")
    stated = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(stated | change if isinstance(change, dict) else change))
    with pytest.raises(UserError, match=file) as refusal:
        build_bundle(folder, tmp_path / "bundle", gpus=[], flavor="onnxruntime")
    assert "\n" not in str(refusal.value) and not (tmp_path / "bundle").exists()


def test_another_checkpoint_needs_replace(tmp_path: Path, toy_bundle: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(toy_bundle, bundle)
    other = make_toy_onnx(tmp_path / "onnx", source="other")
    with pytest.raises(UserError, match=r"holds engines of toy .* --replace"):
        build_bundle(other, bundle, gpus=[], flavor="onnxruntime")
    manifest = build_bundle(other, bundle, gpus=[], flavor="onnxruntime", replace=True)
    assert manifest.source.name == "other" and len(manifest.engines) == 4
    assert not list(bundle.rglob("*.plan"))


def test_a_build_that_waited_does_not_drop_the_engines_of_the_first(
    tmp_path: Path, toy_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two builds of different checkpoints begin together in a bundle that is not there yet."""
    bundle, other = tmp_path / "bundle", make_toy_onnx(tmp_path / "onnx", source="other")
    lock = build_room.bundle_lock

    def overtaken(out: Path) -> object:
        monkeypatch.setattr(build_room, "bundle_lock", lock)
        build_bundle(toy_onnx, bundle, gpus=[], flavor="onnxruntime", components=["text_encoder"])
        return lock(out)

    monkeypatch.setattr(build_room, "bundle_lock", overtaken)
    with pytest.raises(UserError, match=r"holds engines of toy .* --replace"):
        build_bundle(other, bundle, gpus=[], flavor="onnxruntime")
    assert read_manifest(bundle).source.name == "toy" and verify_bundle(bundle) == []


@pytest.mark.parametrize(
    "asked",
    [
        {"layout": "shared", "resolutions": "224x96,128x128", "batches": [2], "guidance": "never"},
        {"resolutions": ",".join(map(str, reversed(MINI_FAMILY.resolutions))), "batches": [1, 4]},
    ],
    ids=["shared", "ranged"],
)
def test_the_command_that_a_fault_names_builds_that_engine_again(
    tmp_path: Path, toy_onnx_fp16: Path, monkeypatch: pytest.MonkeyPatch, asked: dict
) -> None:
    """With all that its key depends on, so that the damaged engine is the one that is replaced."""
    bundle = tmp_path / "bundle"
    before = build_bundle(toy_onnx_fp16, bundle, gpus=["rtx4090", "a100"], components=["unet"], **asked)
    plan = bundle / before.engines[0].files[0].path
    plan.write_bytes(plan.read_bytes()[:-1])
    (fault,) = verify_bundle(bundle)
    arguments = fault.partition("rebuild it with: python -m engines ")[2].replace("ONNX", str(toy_onnx_fp16)).split()
    monkeypatch.setattr("sys.argv", ["engines", *arguments])
    assert main() == 0
    assert verify_bundle(bundle) == []
    assert [engine.key for engine in read_manifest(bundle).engines] == [before.engines[0].key]
    options = {"refit": True, "hardware_compatible": "ampere+"}
    elsewhere = before.engines[0].model_copy(update={"options": options, "gpus": ["NVIDIA A100-SXM4-80GB"]})
    command = rebuild_command(bundle, elsewhere)
    assert command.endswith(" --refit --hardware-compatible ampere+") and "--gpus auto" in command


def test_the_command_that_is_named_mends(tmp_path: Path, toy_onnx: Path) -> None:
    """A manifest that cannot be read, and a file that was slipped in, which is its owner's to remove."""
    bundle = tmp_path / "bundle"
    settings = {"gpus": [], "flavor": "onnxruntime", "components": ["text_encoder"]}
    build_bundle(toy_onnx, bundle, **settings)  # type: ignore[arg-type]
    (bundle / "tokenizer" / "extra.json").write_text("{}")
    build_bundle(toy_onnx, bundle, **settings)  # type: ignore[arg-type]
    [fault] = unnamed_files(bundle, read_manifest(bundle))
    assert "extra.json is not named" in fault and fault.endswith("remove it")
    (bundle / "tokenizer" / "extra.json").unlink()
    assert unnamed_files(bundle, read_manifest(bundle)) == []
    (bundle / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"not valid JSON .* --replace"):
        build_bundle(toy_onnx, bundle, **settings)  # type: ignore[arg-type]
    build_bundle(toy_onnx, bundle, replace=True, **settings)  # type: ignore[arg-type]
    assert verify_bundle(bundle) == [] and len(read_manifest(bundle).engines) == 1


@pytest.mark.parametrize("layout, plans, profiles", [("shared", 1, 2), ("ranged", 1, 1), ("per-resolution", 2, 1)])
def test_layouts(tmp_path: Path, toy_onnx_fp16: Path, layout: str, plans: int, profiles: int) -> None:
    manifest = build_bundle(toy_onnx_fp16, tmp_path / "bundle", gpus=["rtx4090"], layout=layout, **UNET_AT_TWO_SIZES)
    assert len(manifest.engines) == plans
    assert all(len(engine.profiles) == profiles for engine in manifest.engines)
    sizes = [size for engine in manifest.engines for size in engine.resolutions]
    assert sizes == ["128x128", "224x96"]
    shape = manifest.engines[-1].profiles[-1].shapes["sample"]
    assert shape.max == ([2, 4, 16, 28] if layout == "ranged" else [2, 4, 12, 28])  # height, width / 8


def test_static_graphs_are_built_one_by_one_and_kept(tmp_path: Path) -> None:
    folder = make_static(make_toy_onnx(tmp_path / "onnx", "fp16"), ["128x128", "224x96"], batch=2)
    for sizes in ("128x128", "224x96"):
        manifest = build_bundle(folder, tmp_path / "bundle", gpus=["a100"], resolutions=sizes, components=["unet"])
    assert [engine.resolutions for engine in manifest.engines] == [["128x128"], ["224x96"]]
    assert {engine.layout for engine in manifest.engines} == {"per-resolution"}
    assert verify_bundle(tmp_path / "bundle") == []


def test_the_tensorrt_flavor_asks_for_nothing_that_tensorrt_lacks(
    tmp_path: Path, toy_onnx_fp16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way to a bundle, as on an A100, with TensorRT-RTX's builder in TensorRT's place."""
    monkeypatch.syspath_prepend(str(Path(__file__).with_name("as_tensorrt")))
    monkeypatch.setattr("engines.flavors.tensorrt.gpu_at_hand", lambda: ("NVIDIA A100", "8.0"))
    monkeypatch.setattr("engines.gpus.gpu_at_hand", lambda: ("NVIDIA A100", "8.0"))
    try:
        for layout in ("shared", "ranged"):
            asked = {"gpus": ["auto"], "flavor": "tensorrt", "layout": layout} | UNET_AT_TWO_SIZES
            with (
                monkeypatch.context() as full,
                pytest.raises(UserError, match=r"of the GPU's memory .*, 1 kB are free"),
            ):
                full.setattr(build_room, "free_vram_bytes", lambda: 1000)
                build_bundle(toy_onnx_fp16, tmp_path / "full", **asked)
            manifest = build_bundle(toy_onnx_fp16, tmp_path / "bundle", **asked)
    finally:
        sys.modules.pop("tensorrt", None)
    assert {(engine.layout, engine.flavor_version) for engine in manifest.engines} == {
        ("shared", "11.1.0"), ("ranged", "11.1.0"),
    }  # fmt: skip
    assert {engine.gpus[0] for engine in manifest.engines} == {"NVIDIA A100"}
    assert verify_bundle(tmp_path / "bundle") == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gpus": ["rtx9999"]}, "unknown GPU 'rtx9999': known are a10"),
        ({"gpus": ["h100"]}, "cannot target h100 .*9.0.*--flavor tensorrt "),
        ({"gpus": []}, "no GPU named"),
        ({"gpus": ["auto"]}, "auto found no GPU"),
        ({"flavor": "tensorrt"}, "needs the Python package tensorrt|found no GPU"),
        ({"flavor": "openvino"}, "unknown flavor 'openvino'"),
        ({"flavor": "onnxruntime", "gpus": [], "options": {"refit": True}}, "--refit is for TensorRT's plans"),
        ({"resolutions": "100x100"}, "100x100 is not one of this model's: 128x128"),
        ({"resolutions": "big"}, "not of the form WIDTHxHEIGHT"),
        ({"components": ["unet3"]}, "no component 'unet3'"),
        ({"batches": [0]}, "--batches is 0; the least is 1"),
        ({"memory_gb": 0.0}, r"--memory-gb is 0\.0; it must be above 0"),
        ({"memory_gb": float("nan")}, "--memory-gb is nan"),
        ({"memory_gb": 0.1}, "needs about .* MB of memory .* 100 MB may be used"),
    ],
)
def test_bad_input_is_one_clear_line(
    tmp_path: Path, toy_onnx_fp16: Path, change: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("engines.gpus", "engines.flavors.tensorrt"):  # also on a machine with a GPU
        monkeypatch.setattr(f"{module}.gpu_at_hand", lambda position=0: None)
    arguments = {"gpus": ["rtx4090"], "flavor": "tensorrt-rtx"} | change
    with pytest.raises(UserError, match=message) as caught:
        build_bundle(toy_onnx_fp16, tmp_path / "bundle", **arguments)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "bundle").rglob("*.plan"))


def test_cached_files_of_a_container_are_free_memory(tmp_path: Path) -> None:
    for name, text in {"max": "6000000", "current": "5500000", "stat": "anon 1\ninactive_file 300000\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert available_memory_bytes(tmp_path) == 800_000
    (tmp_path / "memory.stat").write_text("active_file 1000000\ninactive_file 300000\n")
    assert available_memory_bytes(tmp_path) == 1_800_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory_bytes(tmp_path) > 1e8, "no limit but the machine's"


def test_a_build_over_its_memory_budget_is_stopped(tmp_path: Path, toy_onnx_fp16: Path) -> None:
    jobs_fit = 0.9  # the estimate for the toy is 0.7 GB, so the build starts
    folder = tmp_path / "bundle"
    original = build_room.run_worker

    def starve(request, budget, progress):  # type: ignore[no-untyped-def]
        return original(request, 50_000_000, progress)

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(UserError, match=r"went over its memory budget of 50 MB"),
    ):
        patch.setattr(build_room, "run_worker", starve)
        build_bundle(toy_onnx_fp16, folder, gpus=["a100"], flavor="tensorrt-rtx", memory_gb=jobs_fit)
    assert not list(folder.rglob("*.plan"))


def test_a_plan_that_could_not_be_written_whole_is_refused(tmp_path: Path, toy_onnx_fp16: Path) -> None:
    """TensorRT takes no notice of a writer that fails; the file may be no larger than a part of the plan."""
    folder, (limit, most) = tmp_path / "bundle", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, most))
        with pytest.raises(
            UserError, match=r"^building text_encoder_2 failed: \[Errno 27\] File too large: '.*\.plan'$"
        ):
            build_bundle(toy_onnx_fp16, folder, gpus=["a100"], components=["text_encoder_2"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert not list(folder.rglob("*.plan"))


def test_two_builds_into_one_bundle(tmp_path: Path, toy_onnx: Path, toy_onnx_fp16: Path) -> None:
    bundle = tmp_path / "bundle"
    first = _command("build", "--onnx", toy_onnx, "--out", bundle, "--flavor", "onnxruntime")
    second = _command("build", "--onnx", toy_onnx_fp16, "--out", bundle, "--gpus", "a100")
    processes = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) for command in (first, second)]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    manifest = read_manifest(bundle)
    assert manifest.flavors == ["onnxruntime", "tensorrt-rtx"] and len(manifest.engines) == 8
    assert verify_bundle(bundle) == []
    assert b"waiting for it" in b"".join(outputs)


def _sound(bundle: Path) -> int:
    """Number of engines of a bundle that must be sound, or not be there yet."""
    if not (bundle / "manifest.json").exists():
        return 0
    assert verify_bundle(bundle) == []
    return len(read_manifest(bundle).engines)


def test_sigkill_at_random_moments_leaves_a_sound_bundle(tmp_path: Path, toy_onnx_fp16: Path) -> None:
    """Each attempt is killed, its children left to themselves, at some moment after one more plan is there or begun; the
    last is left to finish."""
    bundle = tmp_path / "bundle"
    command = _command(
        *("build", "--onnx", toy_onnx_fp16, "--out", bundle, "--gpus", "a100", "--layout", "per-resolution"),
        *("--resolutions", "128x128,160x128,128x160"),
    )
    rng = random.Random(0)
    finished = []
    for _ in range(3):
        before = set(bundle.glob("*/*plan*"))
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not set(bundle.glob("*/*plan*")) - before:
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        finished.append(_sound(bundle))
    assert finished == sorted(finished)
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert _sound(bundle) == 8
    on_disk = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()} - {".lock"}
    recorded = {record.path for record in read_manifest(bundle).all_files} | {"manifest.json"}
    assert on_disk == recorded


def test_manifest_is_canonical_json(toy_bundle: Path) -> None:
    text = (toy_bundle / "manifest.json").read_text()
    assert text == json.dumps(json.loads(text), indent=1, sort_keys=True) + "\n"


def test_killed_before_any_file_operation_it_leaves_a_sound_bundle(tmp_path: Path, toy_onnx: Path) -> None:
    """Not at moments but at places: before every seventh operation on a file (SLIMXL_KILL_EVERY=1: before each)."""
    other = make_toy_onnx(tmp_path / "other", seed=1)
    script = Path(__file__).with_name("kill_everywhere.py")
    every = os.environ.get("SLIMXL_KILL_EVERY", "7")
    result = subprocess.run(
        [sys.executable, script, tmp_path, toy_onnx, other, every],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout.splitlines()[-1]) > 150 / int(every)
