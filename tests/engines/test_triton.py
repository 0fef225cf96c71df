"""The model repository, its configs by Triton's own protobuf, and the model without a server around it."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import engines
from distill.errors import UserError
from engines.bundle import Engine, Manifest, read_manifest
from engines.triton import Serving, choose_place, parse_devices, plan_config, quote, write_repository
from engines.triton_server import Address, Environment
from tests.engines.serving import ROOT, ask

CPU = Serving(flavor="onnxruntime", gpus=())


def parse(environment: Environment, text: str) -> dict[str, Any]:
    """config.pbtxt as Triton reads it; fields that are 0 or false are absent."""
    (config,) = ask(environment, Address(), {"do": "parse_config", "text": text})
    assert "error" not in config, config
    return config


def repository_config(bundle: Path, out: Path, serving: Serving, environment: Environment) -> dict[str, Any]:
    assert write_repository(bundle, out, serving) == ["slimxl"]
    return parse(environment, (out / "slimxl/config.pbtxt").read_text())


def test_repository(toy_bundle: Path, tmp_path: Path, environment: Environment) -> None:
    several = Serving(flavor="onnxruntime", gpus=(), instances=2, queue=7, warm_up=False)
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
    assert config["dynamic_batching"] == {"default_queue_policy": {"max_queue_size": 7}}
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
    }
    source = (tmp_path / "repo/slimxl/1/model.py").read_text()
    assert source == (ROOT / "engines/triton_model.py").read_text()


def test_decoupled_repository(toy_bundle: Path, tmp_path: Path, environment: Environment) -> None:
    config = repository_config(toy_bundle, tmp_path / "repo", Serving(gpus=(), decoupled=True), environment)
    assert config["model_transaction_policy"] == {"decoupled": True}


def test_copies_on_several_gpus(
    toy_bundle: Path, tmp_path: Path, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.triton.choose_flavor", lambda *_: SimpleNamespace(name="tensorrt-rtx"))
    serving = Serving(flavor="tensorrt-rtx", gpus=(0, 2), instances=3)
    config = repository_config(toy_bundle, tmp_path / "repo", serving, environment)
    assert config["instance_group"] == [
        {"count": 3, "kind": "KIND_GPU", "gpus": [0]},
        {"count": 3, "kind": "KIND_GPU", "gpus": [2]},
    ]


def test_where_it_is_served(toy_manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU on the CPU; with some on all of them, where the flavor runs on one."""
    assert choose_place(toy_manifest, None, None) == ("onnxruntime", ())
    with pytest.raises(UserError, match="tensorrt-rtx engines run on a GPU"):
        choose_place(toy_manifest, "tensorrt-rtx", ())
    gpu = SimpleNamespace(name="tensorrt-rtx", default_device=lambda: "cuda:0")
    monkeypatch.setattr("engines.triton.choose_flavor", lambda *_: gpu)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert choose_place(toy_manifest, None, None) == ("tensorrt-rtx", (0, 1))
    assert choose_place(toy_manifest, None, (1,)) == ("tensorrt-rtx", (1,))


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
        ({"plans": True}, "no tensorrt plans"),
        ({"instances": 0}, "--instances 0"),
        ({"queue": 0}, "--queue 0"),
    ],
)
def test_what_cannot_be_served(toy_bundle: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_repository(toy_bundle, tmp_path / "repo", Serving(**{"gpus": (), **change}))
    assert not (tmp_path / "repo").exists()


def test_devices() -> None:
    assert parse_devices("none") == () and parse_devices("auto") is None and parse_devices("0, 3") == (0, 3)
    for text in ("rtx4090", "", "-1"):
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
    serving = Serving(flavor="onnxruntime", gpus=(), plans=True)
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


def test_a_plan_with_a_scalar_input_is_refused(toy_manifest: Manifest) -> None:
    unet = next(e for e in toy_manifest.engines if e.flavor == "tensorrt-rtx" and e.component == "unet")
    inputs = [one.model_copy(update={"shape": []}) if one.name == "timestep" else one for one in unet.inputs]
    with pytest.raises(UserError, match="the unet plan has the scalar input timestep"):
        plan_config("unet", unet.model_copy(update={"inputs": inputs}), (0,))
    assert quote('a "b"\n\\') == '"a \\"b\\"\\n\\\\"'


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """engines/triton_model.py without a server around it."""
    import importlib.util

    backend = ModuleType("triton_python_backend_utils")
    backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1  # type: ignore[attr-defined]
    backend.using_decoupled_model_transaction_policy = lambda config: False  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    spec = importlib.util.spec_from_file_location("triton_model", ROOT / "engines/triton_model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def initialize(model: ModuleType, config: dict[str, Any], kind: str, device: str) -> Any:
    instance = model.TritonPythonModel()
    instance.initialize(
        {"model_config": json.dumps(config), "model_instance_kind": kind, "model_instance_device_id": device}
    )
    return instance


def test_an_instance_loads_onto_its_gpu_and_no_other_bundle(
    model: ModuleType, toy_bundle: Path, tmp_path: Path, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = repository_config(toy_bundle, tmp_path / "repo", Serving(gpus=(), warm_up=False), environment)
    opened: list[Any] = []

    def load(bundle: Path, flavor: str, device: str) -> Any:
        opened.append((bundle, flavor, device))
        component = SimpleNamespace(resolutions=["128x128"])
        return SimpleNamespace(set_progress_bar_config=lambda **_: None, unet=SimpleNamespace(component=component))

    monkeypatch.setattr(engines, "load", load)
    initialize(model, config, "GPU", "3")
    initialize(model, config, "CPU", "0")
    assert opened == [(toy_bundle, "onnxruntime", "cuda:3"), (toy_bundle, "onnxruntime", "cpu")]
    config["parameters"]["manifest_sha256"]["string_value"] = "0" * 64
    with pytest.raises(UserError, match="this repository was written for 000000000000"):
        initialize(model, config, "GPU", "3")
    assert len(opened) == 2


@pytest.mark.parametrize(
    "profiles, requests, together",
    [
        ([(1, 8)], [(1, 5.0)] * 5, 4),  # a range takes four guided pictures
        ([(1, 8)], [(3, 5.0), (2, 5.0)], 1),  # five pictures are too many
        ([(2, 2), (8, 8)], [(1, 5.0)] * 3, 1),  # exact profiles of one and four: three would be padded
        ([(2, 2), (8, 8)], [(1, 5.0)] * 5, 4),
        ([(2, 2)], [(1, 1.0)] * 3, 2),  # two without guidance are one with
        ([(2, 2)], [(16, 5.0)], 1),  # more than any: drawn in pieces
    ],
)
def test_how_many_are_drawn_together(
    model: ModuleType, profiles: list[tuple[int, int]], requests: list[tuple[int, float]], together: int
) -> None:
    def profile(low: int, high: int) -> Any:
        shape = SimpleNamespace(min=[low, 4, 16, 16], max=[high, 4, 16, 16])
        return SimpleNamespace(resolutions=["128x128"], shapes={"sample": shape})

    instance = model.TritonPythonModel()
    engine = SimpleNamespace(profiles=[profile(*one) for one in profiles])
    component = SimpleNamespace(engines=[(engine, None)])
    instance.pipeline = SimpleNamespace(unet=SimpleNamespace(component=component))
    group = [{"width": 128, "height": 128, "images": images, "guidance": guidance} for images, guidance in requests]
    assert instance.most_together(group) == together
