"""Plans as models of Triton's TensorRT backend, their configs by Triton's own protobuf."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from distill.common.errors import UserError
from engines.bundle import MANIFEST, read_manifest
from engines.serving.environment import Environment
from engines.serving.plans import write_plans
from tests.engines.serving.triton_here import parse


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    """Its plans, told to be TensorRT's: one UNet for each of two GPUs."""
    out = tmp_path / "bundle"
    shutil.copytree(toy_bundle, out)
    manifest = read_manifest(out)
    plans = [one.model_copy(update={"flavor": "tensorrt"}) for one in manifest.engines if one.flavor == "tensorrt-rtx"]
    unet = next(one for one in plans if one.component == "unet")
    for capability in ("8.0", "8.9"):
        path = f"unet/{capability}.plan"
        shutil.copyfile(out / unet.files[0].path, out / path)
        file = unet.files[0].model_copy(update={"path": path})
        plans.append(unet.model_copy(update={"compute_capabilities": [capability], "files": [file], "key": unet.key}))
    plans.remove(unet)
    (out / MANIFEST).write_text(manifest.model_copy(update={"engines": plans}).model_dump_json())
    return out


def test_a_component_is_a_model_and_each_gpu_has_its_file(
    bundle: Path, tmp_path: Path, environment: Environment
) -> None:
    names = write_plans(bundle, tmp_path / "repo")
    unet = read_manifest(bundle).engines[-1]
    [name] = [name for name in names if name.startswith("slimxl-unet")]
    config = parse(environment, (tmp_path / "repo" / name / "config.pbtxt").read_text())
    assert config["platform"] == "tensorrt_plan" and "max_batch_size" not in config  # 0, which protobuf leaves out
    assert [one["name"] for one in config["input"]] == [tensor.name for tensor in unet.inputs]
    sample, timestep = config["input"][:2]
    assert sample["data_type"] == "TYPE_FP16" and sample["dims"] == ["-1", "4", "-1", "-1"]
    assert timestep["data_type"] == "TYPE_FP32" and timestep["dims"] == ["1"]
    assert config["instance_group"][0]["profile"] == [str(profile.index) for profile in unet.profiles]
    files = config["cc_model_filenames"]
    assert sorted(files) == ["8.0", "8.9"]
    for file in (*files.values(), config["default_model_filename"]):
        assert (tmp_path / "repo" / name / "1" / file).read_bytes() == (bundle / unet.files[0].path).read_bytes()
    assert write_plans(bundle, tmp_path / "repo") == names  # again, in place of itself


def test_what_triton_could_not_open_is_one_line(bundle: Path, toy_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no plans of TensorRT, .* it has onnxruntime, tensorrt-rtx; build them"):
        write_plans(toy_bundle, tmp_path / "repo")
    plan = bundle / read_manifest(bundle).engines[-1].files[0].path
    plan.write_bytes(plan.read_bytes() + b"x")
    with pytest.raises(UserError, match="the manifest says"):
        write_plans(bundle, tmp_path / "repo")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "holiday.jpg").touch()
    with pytest.raises(UserError, match=r"holds holiday\.jpg, which slimxl did not write"):
        write_plans(bundle, tmp_path / "theirs")
    assert not (tmp_path / "repo").exists()
