from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill.checkpoints.load import load_component, load_pipeline
from distill.checkpoints.random_weights import random_pipeline
from distill.common.errors import UserError
from distill.models.conditioning import SD, SDXL, Conditioning, call_unet, conditioning_of, unet_input_names
from distill.models.families import MINI_FAMILY, SD_2_FAMILY, SDXL_FAMILY, family_of
from distill.models.resolution import NINE, Resolution, scaled_resolutions

PLAIN = {"block_out_channels": (32, 64), "in_channels": 4, "cross_attention_dim": [128, 128]}


def test_a_config_alone_says_which_inputs_a_unet_has() -> None:
    assert unet_input_names(SDXL_FAMILY.unet) == (
        "sample",
        "timestep",
        "encoder_hidden_states",
        "text_embeds",
        "time_ids",
    )
    assert unet_input_names(PLAIN) == ("sample", "timestep", "encoder_hidden_states")
    assert unet_input_names(PLAIN | {"time_cond_proj_dim": 256})[-1] == "timestep_cond"


def test_a_unet_runs_on_its_inputs(mini_vega: Path) -> None:
    unet = load_component(mini_vega, "unet", torch.float32)
    inputs = {spec.name: torch.zeros(spec.shape) for spec in MINI_FAMILY.unet_inputs(Resolution(128, 160), 3)}
    with torch.no_grad():
        assert call_unet(unet, inputs | {"else": torch.zeros(1)}).shape == (3, 4, 20, 16)


def test_no_prompt_is_zeros_or_the_empty_caption_as_the_checkpoint_says(mini_vega: Path) -> None:
    pipe = load_pipeline(mini_vega, torch.float32, without=("unet",))
    with torch.no_grad():
        assert all(not value.any() for value in SDXL.unconditional(pipe).values())
        pipe.register_to_config(force_zeros_for_empty_prompt=False)
        encoded = SDXL.encode(pipe, [""])
        assert all(torch.equal(value, encoded[name]) for name, value in SDXL.unconditional(pipe).items())
    assert {name: tuple(value.shape[1:]) for name, value in encoded.items()} == MINI_FAMILY.text_shapes


@pytest.mark.parametrize(("name", "conditioning"), [("mini-vega", SDXL), ("mini-sd-1.5", SD)])
def test_captions_are_encoded_as_the_pipeline_does(name: str, conditioning: Conditioning) -> None:
    pipe = random_pipeline(name, "cpu", torch.float32)
    captions = ["a red circle", "", "a small ring " * 40]
    with torch.no_grad():
        encoded = conditioning.encode(pipe, captions)
        theirs = pipe.encode_prompt(captions, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    assert torch.equal(encoded["encoder_hidden_states"], theirs[0])
    assert conditioning is SD or torch.equal(encoded["text_embeds"], theirs[2])


def test_sizes_go_to_the_unet_as_height_before_width() -> None:
    [row] = SDXL.size_inputs([(700, 900)], [(3, 5)], [Resolution(1216, 832)])["time_ids"].tolist()
    assert row == [700, 900, 3, 5, 832, 1216]
    assert SD.size_inputs([(700, 900)], [(3, 5)], [Resolution(512, 512)]) == {}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"addition_embed_type": "image"}, "addition_embed_type 'image'"),
        ({"class_embed_type": "timestep"}, "class_embed"),
    ],
)
def test_a_unet_conditioned_otherwise_is_refused(changes: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        conditioning_of(PLAIN | changes, "it")


@pytest.mark.parametrize(("sample_size", "name"), [(64, "sd-2"), (96, "sd-2-768"), (None, "sd-2")])
def test_of_two_families_of_the_same_widths_its_sample_size_tells(sample_size: int | None, name: str) -> None:
    networks = {**SD_2_FAMILY.networks, "unet": SD_2_FAMILY.unet | {"sample_size": sample_size}}
    assert family_of(networks).name == name


def test_other_widths_are_a_family_of_their_own() -> None:
    networks = dict(MINI_FAMILY.networks)
    assert family_of(networks) is MINI_FAMILY
    networks["unet"] = MINI_FAMILY.unet | {"block_out_channels": (32, 64, 96), "sample_size": 32}
    family = family_of(networks)
    assert family.name == "StableDiffusionXL-32-64-96" and family.resolutions[0] == Resolution(256, 256)
    assert all(r.width % family.size_multiple == r.height % family.size_multiple == 0 for r in family.resolutions)
    assert scaled_resolutions(1024, 32) == NINE
