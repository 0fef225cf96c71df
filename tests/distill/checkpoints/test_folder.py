from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig

from distill.checkpoints.folder import check_checkpoint, find_architecture_of
from distill.checkpoints.load import load_component
from distill.checkpoints.sources import resolve
from distill.checkpoints.surgery import make_student, make_student_unet, student_modules
from distill.common.errors import UserError
from distill.models.architectures import ARCHITECTURES, find_architecture
from distill.models.networks import DEFAULTS
from distill.models.unet_config import UNET_DEFAULTS


def test_a_depth_of_ones_own_is_recognised(tmp_path: Path) -> None:
    vega = resolve("random:mini-vega", tmp_path)
    depth = "-/1,1/1,1:0:1,1,1/1,1,1/-"
    student = find_architecture(depth, ARCHITECTURES["mini-vega"].family)
    make_student_unet(vega, student, student_modules(vega, student, "first")[1], tmp_path / "unet")
    shutil.rmtree(vega / "unet")
    (tmp_path / "unet").rename(vega / "unet")
    assert find_architecture_of(vega).name == depth


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "no model_index.json"),
        (lambda folder: (folder / "vae" / "config.json").unlink(), "vae/config.json is missing"),
        (lambda folder: shutil.rmtree(folder / "text_encoder_2"), "text_encoder_2/config.json is missing"),
        (lambda folder: next((folder / "vae").glob("*.safetensors")).unlink(), "holds no .safetensors weights"),
    ],
)
def test_what_is_missing_is_named(copy: Path, damage, message: str) -> None:
    damage(copy)
    with pytest.raises(UserError, match=message):
        resolve(str(copy), copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"addition_embed_type": "text_image"}, "addition_embed_type 'text_image'"),
        ({"class_embed_type": "timestep"}, "takes more than text .class_embed_type"),
        ({"in_channels": 9}, "9 channels in and 4 out"),
    ],
)
def test_a_pipeline_of_another_kind_is_refused(copy: Path, change: dict, message: str) -> None:
    config = copy / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match=message):
        resolve(str(copy), copy)


def test_weights_in_a_format_that_is_not_read_are_named(copy: Path) -> None:
    [weights] = (copy / "vae").glob("*.safetensors")
    tensors = load_file(weights)
    save_file(tensors | {"encoder.conv_in.bias": tensors["encoder.conv_in.bias"].to(torch.float8_e4m3fn)}, weights)
    with pytest.raises(UserError, match=r"encoder.conv_in.bias is stored as F8_E4M3; read are F64, F32, F16, BF16"):
        check_checkpoint(copy)


def change_config(copy: Path, component: str, change: dict[str, Any], drop: tuple[str, ...] = ()) -> None:
    path = copy / component / "config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


def test_the_defaults_for_absent_keys_are_the_libraries_own() -> None:
    unet = inspect.signature(UNet2DConditionModel).parameters
    assert {key: as_list(unet[key].default) for key in UNET_DEFAULTS} == UNET_DEFAULTS
    for kind in (AutoencoderKL, AutoencoderTiny):
        parameters = inspect.signature(kind).parameters
        assert {key: as_list(parameters[key].default) for key in DEFAULTS[kind.__name__]} == DEFAULTS[kind.__name__]
    clip = CLIPTextConfig()
    assert {key: getattr(clip, key) for key in DEFAULTS["CLIPTextModel"]} == DEFAULTS["CLIPTextModel"]


def as_list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("change", "drop"),
    [
        ({}, ("in_channels", "out_channels", "layers_per_block", "sample_size")),
        ({"layers_per_block": [2, 2, 2], "cross_attention_dim": [128] * 3}, ()),
        ({"only_cross_attention": [False] * 3, "attention_head_dim": [1, 2, 2], "sample_size": [16, 16]}, ()),
    ],
)
def test_any_way_to_state_a_unet_is_the_same_unet(change: dict, drop: tuple[str, ...], copy: Path) -> None:
    change_config(copy, "unet", change, drop)
    check_checkpoint(copy)
    assert find_architecture_of(copy).name == "mini-vega"
    expected = load_component(copy, "unet", torch.float32)
    student = ARCHITECTURES["mini-vega"]
    make_student(copy, student, "first", copy.parent / "student")
    made = load_component(copy.parent / "student", "unet", torch.float32).state_dict()
    assert all(torch.equal(made[key], value) for key, value in expected.state_dict().items())


def test_a_unet_without_its_middle_block_type_has_diffusers_own(mini_sdxl: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(mini_sdxl, tmp_path / "copy"))
    change_config(copy, "unet", {}, ("mid_block_type", "_diffusers_version"))
    assert find_architecture_of(copy).name == "mini-sdxl"
    load_component(copy, "unet", torch.float32)


@pytest.mark.parametrize(
    ("component", "change", "message"),
    [
        ("unet", {"down_block_types": ["AttnDownBlock2D"] * 3}, 'down_block_types is .*AttnDownBlock2D.*read are "DownB'),
        ("unet", {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type is .*SimpleCrossAttn"),
        ("unet", {"mid_block_type": [1]}, r"mid_block_type is \[1\]"),
        ("unet", {"block_out_channels": []}, "block_out_channels is .*3 numbers"),
        ("unet", {"block_out_channels": None}, "block_out_channels is null"),
        ("unet", {"block_out_channels": "abc"}, "block_out_channels is .*abc"),
        ("unet", {"block_out_channels": [32, 64]}, "block_out_channels is .*3 numbers"),
        ("unet", {"layers_per_block": None}, "layers_per_block is null"),
        ("unet", {"layers_per_block": [2, 2]}, "layers_per_block is .*3 levels"),
        ("unet", {"layers_per_block": 10**9}, "layers_per_block is 1000000000; numbers from 1 to 1000000"),
        ("unet", {"transformer_layers_per_block": [1, 2, 10**6]}, "more than 10000 transformer blocks"),
        ("text_encoder", {"num_hidden_layers": 10**9}, "num_hidden_layers of its text_encoder is 1000000000; a number"),
        ("unet", {"layers_per_block": "2"}, 'layers_per_block is "2"'),
        ("unet", {"cross_attention_dim": [128, 64, 128]}, "cross_attention_dim is .*must be alike"),
        ("unet", {"cross_attention_dim": 0}, "cross_attention_dim is 0"),
        ("unet", {"cross_attention_dim": 64}, "cross_attention_dim is 64, the hidden_size of .* together is 128"),
        ("unet", {"sample_size": -1}, "sample_size is -1"),
        ("unet", {"attention_head_dim": [1, 2]}, "attention_head_dim is .*3 levels"),
        ("unet", {"transformer_layers_per_block": [[1, 1], [1, 1], [2, 2]], "reverse_transformer_layers_per_block": None},
         "reverse_transformer_layers_per_block is needed"),
        ("unet", {"reverse_transformer_layers_per_block": [[2, 2], [1, 1, 1], 1]}, "reverse_.* for a level of 3 layers"),
        ("unet", {"projection_class_embeddings_input_dim": 2560}, "do not belong together"),
        ("unet", {"up_block_types": ["UpBlock2D"]}, "up_block_types is .*as many as down_block_types"),
        ("unet", {"attention_head_dim": [0, 2, 2]}, r"attention_head_dim is \[0, 2, 2\]"),
        ("unet", {"norm_num_groups": 0}, "norm_num_groups is 0"),
        ("unet", {"in_channels": 9}, "9 channels in and 4 out"),
        ("vae", {"latent_channels": 16}, "in_channels is 4, the vae's latent_channels is 16"),
        ("vae", {"layers_per_block": 10**9}, "layers_per_block of its vae is 1000000000; a number from 1 to 1000"),
        ("vae", {"scaling_factor": 0}, "scaling_factor of its vae is 0; a number above 0"),
        ("vae", {"scaling_factor": "x"}, "scaling_factor of its vae is 'x'"),
        ("vae", {"block_out_channels": None}, "block_out_channels of its vae is None"),
        ("unet", {"addition_time_embed_dim": None}, "less 6 times its addition_time_embed_dim is 256"),
        ("text_encoder", {"hidden_size": "64"}, "hidden_size of its text_encoder is '64'"),
    ],
)  # fmt: skip
def test_what_no_unet_can_be_is_named_by_its_key(component: str, change: dict, message: str, copy: Path) -> None:
    change_config(copy, component, change)
    with pytest.raises(UserError, match=message) as refusal:
        check_checkpoint(copy)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["[]", "null", "", "3", '"x"', "{", "[" * 100_000, "\ufeff{}", '{"a": NaN}'])
@pytest.mark.parametrize(
    "name", ["unet/config.json", "text_encoder/config.json", "vae/config.json", "model_index.json"]
)
def test_a_config_that_holds_something_else_is_one_line(name: str, text: str, copy: Path) -> None:
    (copy / name).write_text(text)
    with pytest.raises(UserError, match=name) as refusal:
        check_checkpoint(copy)
    assert "\n" not in str(refusal.value)
