from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open

from distill.checkpoints.load import load_component
from distill.checkpoints.sources import MINI_TEACHERS
from distill.common.errors import UserError
from distill.data.shapes import ATTRIBUTES, Scene, render
from distill.mini import teach, teach_unet, teach_vae
from distill.mini.judge import judge, share_followed
from distill.models.architectures import ARCHITECTURES
from distill.models.families import MINI_FAMILY
from distill.models.networks import make_network

BRIEF: Any = {"minutes": 0.02, "learning_rate": 1e-4, "batch": 4, "seed": 0}
MINI_SD = ARCHITECTURES["mini-sd-1.5"]


@pytest.fixture
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = teach_vae.draw_pictures
    for module in (teach_vae, teach_unet):
        monkeypatch.setattr(module, "draw_pictures", lambda count, *rest: draw(min(count, 32), *rest))


def test_a_teacher_is_made_from_nothing(few_pictures: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teach, "judge", partial(judge, count=9, steps=1))
    shares = teach.teach_mini(
        tmp_path, architecture="mini-sdxl", start=None, vae_steps=2, vae_whole_steps=1, decoder_steps=1, **BRIEF
    )
    assert shares.keys() == {*ATTRIBUTES, "all"}
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    assert pipe.vae.config.scaling_factor not in (0.18215, 1.0)
    with safe_open(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118 (no mapping)
    assert not (tmp_path / "teach.state").exists()


def test_another_family_begins_with_the_networks_that_it_shares(
    few_pictures: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teach, "judge", partial(judge, count=3, steps=1))
    begun = {"start": "mini:sdxl", "vae_steps": 0, "vae_whole_steps": 0, "decoder_steps": 0}
    teach.teach_mini(tmp_path, architecture="mini-sd-1.5", **begun, **BRIEF)
    pipe, ours = (
        StableDiffusionPipeline.from_pretrained(tmp_path),
        load_component(MINI_TEACHERS["sdxl"], "vae", torch.float32),
    )
    assert all(torch.equal(pipe.vae.state_dict()[key], value) for key, value in ours.state_dict().items())
    with pytest.raises(UserError, match=r"sd-1\.5 is of no mini family"):
        teach.teach_mini(tmp_path / "no", architecture="sd-1.5", **begun, **BRIEF)


def test_a_unet_begins_with_what_fits_of_another_familys() -> None:
    source, unet = (make_network("unet", ARCHITECTURES[name].configs["unet"]) for name in ("mini-sdxl", "mini-sd-1.5"))
    assert teach.begun_from(source, unet) == 494
    ours, theirs, reads = unet.state_dict(), source.state_dict(), "transformer_blocks.0.attn2.to_k.weight"
    first_encoder = theirs[f"up_blocks.0.attentions.0.{reads}"][:, :64]
    assert torch.equal(ours[f"up_blocks.1.attentions.0.{reads}"], first_encoder)
    assert not ours["up_blocks.3.attentions.0.proj_out.weight"].any()


def test_polishing_the_decoder_leaves_the_latents_alone(few_pictures: None, tmp_path: Path) -> None:
    vae = AutoencoderKL(**MINI_FAMILY.vae)
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    teach_vae.polish_decoder(vae, tmp_path, steps=1)
    changed = {key.split(".")[0] for key, value in vae.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"decoder", "post_quant_conv"}


def test_a_killed_teacher_goes_on_where_it_was(
    few_pictures: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in the midst of the second state's writing, with the first one whole."""
    monkeypatch.setattr(teach_unet, "_SAVE_EVERY", 0.0)
    pipe = teach.make_mini_pipeline(MINI_SD, {})
    save, written = torch.save, []

    def save_once(state: dict, path: Path) -> None:
        if written:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(state["step"])
        save(state, path)

    monkeypatch.setattr(torch, "save", save_once)
    with pytest.raises(KeyboardInterrupt):
        teach_unet.teach_unet(pipe, MINI_SD.family, tmp_path, minutes=10, batch=4)
    monkeypatch.setattr(torch, "save", save)
    assert written == [1] and not (tmp_path / "unet").exists()
    other = teach.make_mini_pipeline(MINI_SD, {"vae": pipe.vae})
    teach_unet.teach_unet(other, MINI_SD.family, tmp_path, minutes=0.02, batch=4)
    assert "going on at step 1" in capsys.readouterr().out
    assert (tmp_path / "unet").exists() and not (tmp_path / "teach.state").exists()


def test_the_share_of_right_pictures_is_counted_by_attribute() -> None:
    resolution = MINI_FAMILY.resolutions[0]
    scenes = [
        Scene.parse(f"a large red {shape} at the top left on a {background} background")
        for shape, background in (("circle", "white"), ("square", "black"), ("ring", "gray"), ("star", "brown"))
    ]
    images = np.stack([render(scene, resolution) for scene in scenes])
    images[0] = images[0][::-1]  # now at the bottom left
    shares = share_followed(scenes, images)
    assert shares == {"background": 1.0, "position": 0.75, "color": 0.75, "shape": 0.75, "size": 0.75, "all": 0.75}
