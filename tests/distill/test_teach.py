from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline

from distill import teach
from distill.shapes import ATTRIBUTES


@pytest.fixture
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = teach._pictures
    monkeypatch.setattr(teach, "_pictures", lambda count, *rest: pictures(min(count, 16), *rest))


def test_a_teacher_is_made_from_nothing(few_pictures: None, tmp_path: Path) -> None:
    teach.teach_vae(tmp_path, steps=2, whole_steps=1)
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert vae.config.scaling_factor not in (0.18215, 1.0)
    pipe = teach.teach_unet(vae, tmp_path, minutes=0.02)
    before = {key: value.clone() for key, value in vae.encoder.state_dict().items()}
    teach.polish_decoder(vae, tmp_path, steps=1)
    assert all(torch.equal(value, before[key]) for key, value in vae.encoder.state_dict().items())
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    shares = teach.judge(pipe, count=9, steps=1)
    assert shares.keys() == {*ATTRIBUTES, "all"}


def test_the_share_of_right_pictures_is_counted_by_attribute() -> None:
    rng = np.random.default_rng(0)
    scenes, images = teach._pictures(4, teach.MINI_FAMILY.resolutions[0], rng)
    images[0] = images[0][::-1]
    shares = teach.share_followed([*scenes, *scenes], np.concatenate([images, images]))
    assert shares["all"] in (0.75, 1.0) and shares["background"] == 1.0
