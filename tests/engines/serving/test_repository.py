"""The model repository, its configs by Triton's own protobuf."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill.common.errors import UserError
from engines.bundle import Manifest, read_manifest
from engines.serving.environment import Environment
from engines.serving.options import Serving
from engines.serving.placement import Placement, choose_placement, parse_devices, served_sizes
from engines.serving.repository import quote, write_repository
from tests.engines.serving.triton_here import ROOT, repository_config

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
        "steps": "25",
        "guidance": "5.0",
        "warm_up": "false",
        "runtime_cache": str(cache),
    }
    source = (tmp_path / "repo/slimxl/1/model.py").read_text()
    assert source == (ROOT / "engines/serving/model.py").read_text()


def test_decoupled_repository(toy_bundle: Path, tmp_path: Path, environment: Environment) -> None:
    config = repository_config(
        toy_bundle, tmp_path / "repo", Serving(gpus="none", decoupled=True, queue=0), environment
    )
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert config["dynamic_batching"] == {}, "any limit, and Triton's batcher may sleep over a request"


def test_copies_on_several_gpus(
    toy_bundle: Path, tmp_path: Path, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.serving.placement.choose_flavor", lambda *_: SimpleNamespace(name="tensorrt-rtx"))
    serving = Serving(flavor="tensorrt-rtx", gpus="0,2", instances=3)
    config = repository_config(toy_bundle, tmp_path / "repo", serving, environment)
    assert config["instance_group"] == [
        {"count": 3, "kind": "KIND_GPU", "gpus": [0]},
        {"count": 3, "kind": "KIND_GPU", "gpus": [2]},
    ]


def test_where_it_is_served(toy_manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU on the CPU; with some on all that the engines fit, where the flavor runs on one."""
    assert choose_placement(toy_manifest, None, None) == Placement("onnxruntime", ())
    with pytest.raises(UserError, match="tensorrt-rtx engines run on a GPU"):
        choose_placement(toy_manifest, "tensorrt-rtx", ())
    gpu = SimpleNamespace(name="tensorrt-rtx", default_device=lambda: "cuda:0")
    monkeypatch.setattr("engines.serving.placement.choose_flavor", lambda *_: gpu)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)

    def select(manifest: Manifest, backend: Any, device: str) -> None:
        if device not in fitting:
            raise UserError(f"not on {device}")

    monkeypatch.setattr("engines.serving.placement.select_engines", select)
    fitting = {"cuda:0", "cuda:2"}
    assert choose_placement(toy_manifest, None, None) == Placement("tensorrt-rtx", (0, 2))
    assert choose_placement(toy_manifest, None, (1,)) == Placement("tensorrt-rtx", (1,))
    fitting = set()
    with pytest.raises(UserError, match="not on cuda:2"):
        choose_placement(toy_manifest, None, None)


def test_only_what_is_loaded_is_promised(toy_manifest: Manifest) -> None:
    """`engines.load` opens no engine whose sizes another serves."""
    unet = next(e for e in toy_manifest.engines if e.flavor == "onnxruntime" and e.component == "unet")
    other = unet.model_copy(update={"layout": "per-resolution", "resolutions": ["640x384"], "batches": [8]})
    manifest = toy_manifest.model_copy(update={"engines": [*toy_manifest.engines, other]})
    assert served_sizes(manifest, Placement("onnxruntime", ())) == (unet.resolutions, 1)


def test_a_repository_may_be_for_another_machine(toy_manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the GPU of that number here runs none of the plans, or has no TensorRT."""
    monkeypatch.setattr("engines.flavors.tensorrt.gpu_of_device", lambda device: ("NVIDIA RTX 5090", "12.0"))
    unet = next(e for e in toy_manifest.engines if e.flavor == "tensorrt-rtx" and e.component == "unet")
    assert served_sizes(toy_manifest, Placement("tensorrt-rtx", (0,))) == (unet.resolutions, 1)
    with pytest.raises(UserError, match="has no tensorrt engine for unet"):
        served_sizes(toy_manifest, Placement("tensorrt", (0,)))


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
    with pytest.raises(UserError, match=r"holds theirs.config\.pbtxt, which slimxl did not write"):
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
        ({"instances": 0}, "--instances is 0"),
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


def test_texts_are_quoted_for_protobuf() -> None:
    assert quote('a "b"\n\\') == '"a \\"b\\"\\n\\\\"'
