"""The model repository, its configs by Triton's own protobuf."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill.common.errors import UserError
from engines.bundle import Engine, Manifest, read_manifest
from engines.serving.triton import (
    choose_place,
    choose_plans,
    parse_devices,
    plan_config,
    quote,
    served,
    write_repository,
)
from engines.serving.triton_options import Serving
from engines.serving.triton_server import Environment
from tests.engines.serving.triton_here import ROOT, parse, repository_config

CPU = Serving(flavor="onnxruntime", gpus="none")


def test_repository(toy_bundle: Path, tmp_path: Path, environment: Environment) -> None:
    cache = tmp_path / "kernels"
    several = Serving(flavor="onnxruntime", gpus="none", instances=2, queue=7, warm_up=False, runtime_cache=cache)
    config = repository_config(toy_bundle, tmp_path / "repo", several, environment)
    inputs = {one["name"]: one for one in config["input"]}
    outputs = {one["name"]: one for one in config["output"]}
    assert list(inputs) == ["prompt", "negative_prompt", "width", "height", "steps", "guidance", "seed", "images"]
    assert all(one["dims"] == ["1"] for one in inputs.values())
    assert [name for name, one in inputs.items() if not one.get("optional")] == ["prompt"]
    assert [inputs[name]["data_type"] for name in ("prompt", "steps", "guidance", "seed")] == [
        "TYPE_STRING", "TYPE_INT32", "TYPE_FP32", "TYPE_INT64",
    ]  # fmt: skip
    assert (outputs["image"]["data_type"], outputs["image"]["dims"]) == ("TYPE_UINT8", ["-1", "-1", "-1", "3"])
    assert config["backend"] == "python" and config["max_batch_size"] == 1
    assert config["instance_group"] == [{"count": 2, "kind": "KIND_CPU"}]
    assert config["dynamic_batching"]["default_queue_policy"] == {
        "default_timeout_microseconds": "300000000",
        "allow_timeout_override": True,
        "max_queue_size": 7,
    }
    assert config["response_cache"] == {} and "model_transaction_policy" not in config
    parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
    manifest = toy_bundle / "manifest.json"
    assert parameters == {
        "bundle": str(toy_bundle),
        "manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest(),
        "source": "toy",
        "flavor": "onnxruntime",
        "sizes": ",".join(read_manifest(toy_bundle).engines[0].resolutions),
        "warm_up": "false",
        "runtime_cache": str(cache),
    }
    source = (tmp_path / "repo/slimxl/1/model.py").read_text()
    assert source == (ROOT / "engines/serving/triton_model.py").read_text()


def test_decoupled_repository(toy_bundle: Path, tmp_path: Path, environment: Environment) -> None:
    config = repository_config(
        toy_bundle, tmp_path / "repo", Serving(gpus="none", decoupled=True, queue=0), environment
    )
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert config["dynamic_batching"] == {}, "any limit, and Triton's batcher may sleep over a request"


def test_copies_on_several_gpus(
    toy_bundle: Path, tmp_path: Path, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.serving.triton.choose_flavor", lambda *_: SimpleNamespace(name="tensorrt-rtx"))
    serving = Serving(flavor="tensorrt-rtx", gpus="0,2", instances=3)
    config = repository_config(toy_bundle, tmp_path / "repo", serving, environment)
    assert config["instance_group"] == [
        {"count": 3, "kind": "KIND_GPU", "gpus": [0]},
        {"count": 3, "kind": "KIND_GPU", "gpus": [2]},
    ]


def test_where_it_is_served(toy_manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU on the CPU; with some on all that the engines fit, where the flavor runs on one."""
    assert choose_place(toy_manifest, None, None) == ("onnxruntime", ())
    with pytest.raises(UserError, match="tensorrt-rtx engines run on a GPU"):
        choose_place(toy_manifest, "tensorrt-rtx", ())
    gpu = SimpleNamespace(name="tensorrt-rtx", default_device=lambda: "cuda:0")
    monkeypatch.setattr("engines.serving.triton.choose_flavor", lambda *_: gpu)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)

    def select(manifest: Manifest, backend: Any, device: str) -> None:
        if device not in fitting:
            raise UserError(f"not on {device}")

    monkeypatch.setattr("engines.serving.triton.select_engines", select)
    fitting = {"cuda:0", "cuda:2"}
    assert choose_place(toy_manifest, None, None) == ("tensorrt-rtx", (0, 2))
    assert choose_place(toy_manifest, None, (1,)) == ("tensorrt-rtx", (1,))
    fitting = set()
    with pytest.raises(UserError, match="not on cuda:2"):
        choose_place(toy_manifest, None, None)


def test_only_what_is_loaded_is_promised(toy_manifest: Manifest) -> None:
    """`engines.load` opens no engine whose sizes another serves."""
    unet = next(e for e in toy_manifest.engines if e.flavor == "onnxruntime" and e.component == "unet")
    other = unet.model_copy(update={"layout": "per-resolution", "resolutions": ["640x384"], "batches": [8]})
    manifest = toy_manifest.model_copy(update={"engines": [*toy_manifest.engines, other]})
    assert served(manifest, "onnxruntime", ()) == (unet.resolutions, 1)


def test_a_repository_may_be_for_another_machine(toy_manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the GPU of that number here runs none of the plans, or has no TensorRT."""
    for module in ("engines.serving.triton", "engines.flavors.tensorrt"):
        monkeypatch.setattr(f"{module}.gpu_of_device", lambda device: ("NVIDIA RTX 5090", "12.0"))
    unet = next(e for e in toy_manifest.engines if e.flavor == "tensorrt-rtx" and e.component == "unet")
    assert served(toy_manifest, "tensorrt-rtx", (0,)) == (unet.resolutions, 1)
    with pytest.raises(UserError, match="has no tensorrt engine for unet"):
        served(toy_manifest, "tensorrt", (0,))


def test_what_cannot_be_replaced_is_refused(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    for out, message in (("file", "is a file"), (".", "the working directory"), ("/", "a mount point")):
        with pytest.raises(UserError, match=f"{message}.*pass a folder"):
            write_repository(toy_bundle, Path(out), CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_other_peoples_models_stay(toy_bundle: Path, tmp_path: Path) -> None:
    write_repository(toy_bundle, tmp_path, CPU)
    write_repository(toy_bundle, tmp_path, CPU)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.pbtxt").write_text('name: "theirs"')
    with pytest.raises(UserError, match="holds theirs, which slimxl did not write"):
        write_repository(toy_bundle, tmp_path, CPU)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slimxl", "theirs"]


def test_damaged_bundle_is_not_served(toy_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(toy_bundle, bundle)
    path = bundle / read_manifest(bundle).engines[0].files[0].path
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match="the manifest says"):
        write_repository(bundle, tmp_path / "repo", CPU)
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"flavor": "tensorrt"}, "has no tensorrt engines"),
        ({"plans": True}, "no tensorrt plans in layout ranged"),
        ({"instances": 0}, "--instances is 0"),
        ({"queue": -1}, "--queue is -1"),
    ],
)
def test_what_cannot_be_served(toy_bundle: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_repository(toy_bundle, tmp_path / "repo", Serving(**{"gpus": "none", **change}))
    assert not (tmp_path / "repo").exists()


def test_devices() -> None:
    assert parse_devices("none") == () and parse_devices("auto") is None and parse_devices("0, 3,0") == (0, 3)
    for text in ("rtx4090", "", "-1", "²"):
        with pytest.raises(UserError, match="not a list of CUDA device numbers"):
            parse_devices(text)


def as_tensorrt(engine: Engine) -> Engine:
    """The engine as if TensorRT had built it, its profiles doubled."""
    profiles = [engine.profiles[0], engine.profiles[0].model_copy(update={"index": 1})]
    return engine.model_copy(update={"flavor": "tensorrt", "profiles": profiles})


def test_plans_as_models_of_their_own(toy_bundle: Path, tmp_path: Path, environment: Environment) -> None:
    """Every field of every component's config, read by Triton's protobuf, is what the manifest says."""
    bundle = tmp_path / "bundle"
    shutil.copytree(toy_bundle, bundle)
    manifest = read_manifest(bundle)
    plans = [as_tensorrt(e) if e.flavor == "tensorrt-rtx" else e for e in manifest.engines]
    (bundle / "manifest.json").write_text(manifest.model_copy(update={"engines": plans}).model_dump_json())
    plans = [engine for engine in plans if engine.flavor == "tensorrt"]
    assert {engine.component for engine in plans} == {"unet", "vae_decoder", "text_encoder", "text_encoder_2"}
    serving = Serving(flavor="onnxruntime", gpus="none", plans=True)
    names = write_repository(bundle, tmp_path / "repo", serving)
    assert len(names) == 1 + len(plans)
    kinds = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64"}
    for name, engine in zip(names[1:], plans, strict=True):
        config = parse(environment, (tmp_path / f"repo/{name}/config.pbtxt").read_text())

        def tensors(infos: list[Any]) -> list[dict[str, Any]]:
            return [
                {
                    "name": info.name,
                    "data_type": kinds[info.dtype],
                    "dims": [str(side) if isinstance(side, int) else "-1" for side in info.shape],
                }
                for info in infos
            ]

        assert config == {
            "name": name,
            "platform": "tensorrt_plan",
            "input": tensors(engine.inputs),
            "output": tensors(engine.outputs),
            "instance_group": [{"count": 1, "kind": "KIND_GPU", "gpus": [0], "profile": ["0", "1"]}],
        }
        plan = (tmp_path / f"repo/{name}/1/model.plan").read_bytes()
        assert hashlib.sha256(plan).hexdigest() == engine.files[0].sha256


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layout": "shared"}, "no tensorrt plans in layout ranged"),
        ({"options": {"strip": True}}, "no plans without weights"),
        ({"flavor_version": "99.0"}, r"plans for TensorRT .*, 99\.0"),
        ({"compute_capabilities": ["7.5"]}, r"plans for compute capability 7\.5, 8\.0 and 8\.9"),
    ],
)
def test_plans_that_triton_would_not_open(toy_manifest: Manifest, change: dict[str, Any], message: str) -> None:
    """One that it cannot open would end the whole server."""
    plans = [as_tensorrt(engine) for engine in toy_manifest.engines if engine.flavor == "tensorrt-rtx"]
    manifest = toy_manifest.model_copy(update={"engines": plans})
    assert choose_plans(manifest, (0,)) == plans
    changed = [plan.model_copy(update=change) if plan.component == "unet" else plan for plan in plans]
    with pytest.raises(UserError, match=message):
        choose_plans(manifest.model_copy(update={"engines": changed}), (0,))


def test_plans_that_fit_the_gpu_here(toy_manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [as_tensorrt(engine) for engine in toy_manifest.engines if engine.flavor == "tensorrt-rtx"]
    others = [plan.model_copy(update={"compute_capabilities": ["12.0"]}) for plan in plans]
    monkeypatch.setattr("engines.serving.triton.gpu_of_device", lambda device: ("NVIDIA RTX 5090", "12.0"))
    assert choose_plans(toy_manifest.model_copy(update={"engines": plans + others}), (0,)) == others
    with pytest.raises(UserError, match="for NVIDIA RTX 5090"):
        choose_plans(toy_manifest.model_copy(update={"engines": plans}), (0,))


def test_a_plan_with_a_scalar_input_is_refused(toy_manifest: Manifest) -> None:
    unet = next(e for e in toy_manifest.engines if e.flavor == "tensorrt-rtx" and e.component == "unet")
    inputs = [one.model_copy(update={"shape": []}) if one.name == "timestep" else one for one in unet.inputs]
    with pytest.raises(UserError, match="the unet plan has the scalar input timestep"):
        plan_config("unet", unet.model_copy(update={"inputs": inputs}), (0,))
    assert quote('a "b"\n\\') == '"a \\"b\\"\\n\\\\"'
