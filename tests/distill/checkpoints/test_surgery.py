from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from distill.__main__ import main
from distill.checkpoints.folder import find_architecture_of
from distill.checkpoints.load import load_component, load_pipeline
from distill.checkpoints.surgery import make_student, make_student_unet, plan_surgery, student_modules, unet_shapes
from distill.checkpoints.tensors import component_tensors, component_weights
from distill.common.errors import UserError
from distill.models.architectures import ARCHITECTURES, SDXL_DEPTH, SSD_1B_DEPTH, VEGA_DEPTH, Architecture
from distill.models.module_map import ModuleMap, make_module_map, read_layer_map


def modules_of(checkpoint: Path, student: Architecture, layer_map: str = "first") -> ModuleMap:
    return student_modules(checkpoint, student, layer_map)[1]


@pytest.mark.parametrize("preset", ["first", "spread", "similarity"])
@pytest.mark.parametrize(("teacher", "student"), [("sdxl", "ssd-1b"), ("sdxl", "vega")])
def test_every_tensor_is_accounted_for_at_full_size(teacher: str, student: str, preset: str) -> None:
    depths = [ARCHITECTURES[name].depth for name in (teacher, student)]
    shapes = [unet_shapes(ARCHITECTURES[name].unet_config) for name in (teacher, student)]
    plan = plan_surgery(*shapes, make_module_map(preset, *depths))
    assert set(plan.sources) == set(shapes[1])
    assert set(plan.sources.values()).isdisjoint(plan.unused)
    assert set(plan.sources.values()) | set(plan.unused) == set(shapes[0])
    assert any(key.startswith("mid_block.resnets.1.") for key in plan.unused)


@pytest.mark.parametrize("preset", ["first", "spread", "similarity"])
def test_vegas_blocks_are_among_ssd_1bs(preset: str) -> None:
    ssd_1b = make_module_map(preset, SDXL_DEPTH, SSD_1B_DEPTH)
    relative = make_module_map(preset, SDXL_DEPTH, VEGA_DEPTH).relative_to(ssd_1b)
    assert set(relative.paths.values()) <= ssd_1b.paths.keys()


def test_copied_weights_are_the_teachers(mini_sdxl: Path, tmp_path: Path) -> None:
    student = ARCHITECTURES["mini-ssd-1b"]
    plan = make_student_unet(mini_sdxl, student, modules_of(mini_sdxl, student, "similarity"), tmp_path / "unet")
    path = "down_blocks.2.attentions.0.transformer_blocks"
    assert plan.sources[f"{path}.3.attn1.to_q.weight"] == f"{path}.6.attn1.to_q.weight"
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    teacher = UNet2DConditionModel.from_pretrained(mini_sdxl / "unet").state_dict()
    for key, value in unet.state_dict().items():
        assert torch.equal(value, teacher[plan.sources[key]]), key


def test_a_student_of_ones_own_depth_is_a_whole_pipeline(mini_sdxl: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    layer_map = tmp_path / "importance.json"
    layer_map.write_text(json.dumps({"layer_map": {"down_blocks.2.attentions.1": [4, 7]}}))
    depth = "-/1,1/3,2:0:2,2,1/1,1,1/-"
    arguments = ["--model", mini_sdxl, "--student", depth, "--layer-map", layer_map, "--out", tmp_path / "student"]
    monkeypatch.setattr("sys.argv", ["distill", "surgery", *map(str, arguments)])
    assert main() == 0
    pipe = load_pipeline(tmp_path / "student", torch.float32)
    assert str(find_architecture_of(tmp_path / "student").depth) == depth
    accounts = json.loads((tmp_path / "student" / "surgery.json").read_text())
    assert accounts["sources"].keys() == pipe.unet.state_dict().keys()
    teacher = component_tensors(mini_sdxl / "unet").keys()
    assert set(accounts["sources"].values()) | set(accounts["unused"]) == set(teacher)
    block = "down_blocks.2.attentions.1.transformer_blocks.{}.attn1.to_q.weight"
    assert accounts["sources"][block.format(1)] == block.format(7)
    assert main() == 2 and "exists already" in capsys.readouterr().err


def test_a_file_that_is_no_layer_map_is_refused(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="is no layer map"):
        read_layer_map(str(tmp_path / "map.json"))


def test_config_json_says_what_the_weights_are(mini_sdxl: Path, tmp_path: Path) -> None:
    vega = ARCHITECTURES["mini-vega"]
    make_student_unet(mini_sdxl, vega, modules_of(mini_sdxl, vega), tmp_path / "unet")
    built = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(tmp_path / "unet"))
    assert built.state_dict().keys() == component_tensors(tmp_path / "unet").keys()


def test_what_a_teacher_has_beyond_its_family_its_student_has_too(mini_vega: Path, tmp_path: Path) -> None:
    """As an LCM, whose time embedding takes the guidance scale."""
    config = UNet2DConditionModel.load_config(mini_vega / "unet") | {"time_cond_proj_dim": 16}
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path / "teacher" / "unet")
    modules = make_module_map("first", VEGA_DEPTH, VEGA_DEPTH)
    make_student_unet(tmp_path / "teacher", ARCHITECTURES["mini-vega"], modules, tmp_path / "unet")
    tensors = component_tensors(tmp_path / "unet")
    assert tensors.keys() == UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict().keys()
    assert "time_embedding.cond_proj.weight" in tensors


def test_explicit_indices_are_kept_and_checked() -> None:
    path = "down_blocks.2.attentions.0"
    assert make_module_map({path: (0, 3, 5, 9)}, SDXL_DEPTH, SSD_1B_DEPTH).blocks(path) == (0, 3, 5, 9)
    assert make_module_map({path: (3, 9)}, SDXL_DEPTH, SSD_1B_DEPTH).blocks(path) == (0, 1, 3, 9)  # filled up
    for wrong in [(0, 1, 2, 10), (3, 2, 1, 0), (1, 1, 2, 3), (0, 1, 2, 3, 4), ()]:
        with pytest.raises(UserError, match="rising indices below 10"):
            make_module_map({path: wrong}, SDXL_DEPTH, SSD_1B_DEPTH)
    with pytest.raises(UserError, match="unknown module of the student in the layer map"):
        make_module_map({"mid_block.attentions.0": (0,)}, SDXL_DEPTH, SSD_1B_DEPTH)
    with pytest.raises(UserError, match="unknown layer map 'last'"):
        make_module_map("last", SDXL_DEPTH, SSD_1B_DEPTH)


def test_a_student_deeper_than_its_teacher_is_refused() -> None:
    with pytest.raises(UserError, match="its teacher only"):
        make_module_map("first", VEGA_DEPTH, SSD_1B_DEPTH)


def test_maps_that_are_not_nested_are_refused() -> None:
    held = make_module_map("first", SDXL_DEPTH, SSD_1B_DEPTH)
    wanted = make_module_map("spread", SDXL_DEPTH, VEGA_DEPTH)
    with pytest.raises(UserError, match="nested"):
        wanted.relative_to(held)


def test_a_student_takes_from_its_teacher_what_it_needs_under_plain_names(mini_vega: Path, tmp_path: Path) -> None:
    """The teacher is a hub's: fp16 variants, one in shards, one with a twin in fp32, and all that lies beside them."""
    teacher = Path(shutil.copytree(mini_vega, tmp_path / "teacher"))
    encoder = load_component(teacher, "text_encoder_2", torch.float16)
    (teacher / "text_encoder_2" / "model.safetensors").unlink()
    encoder.save_pretrained(teacher / "text_encoder_2", variant="fp16", max_shard_size="300KB")
    assert len(component_weights(teacher / "text_encoder_2")) > 1
    plain = teacher / "text_encoder" / "model.safetensors"
    plain.rename(plain.with_name("model.fp16.safetensors"))
    plain = teacher / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copyfile(plain, plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    for junk in (".git/lfs/objects", "whole.safetensors", "text_encoder/model.onnx", "vae/diffusion_pytorch_model.bin"):
        (teacher / junk).parent.mkdir(parents=True, exist_ok=True)
        (teacher / junk).write_bytes(b"junk")
    index = teacher / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"feature_extractor": [None, None]}))

    out = tmp_path / "student"
    make_student(teacher, ARCHITECTURES["mini-vega"], "first", out)
    pipe = StableDiffusionXLPipeline.from_pretrained(out)
    ours = load_pipeline(out, torch.float32)
    for component in ("text_encoder", "text_encoder_2", "vae"):
        loaded, wanted = getattr(pipe, component), load_component(teacher, component, torch.float32)
        for key, value in wanted.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value) and torch.equal(
                getattr(ours, component).state_dict()[key], value
            )
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert not any("fp16" in name or "junk" in (out / name).read_text(errors="ignore")[:4] for name in names)
    assert {path.name for path in out.iterdir()} - {path.name for path in mini_vega.iterdir()} == {
        "slimxl.json",
        "surgery.json",
    }
