from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from bench.search.quality import Quality, passed_by
from bench.search.space import student_after
from distill.models.architectures import find_architecture
from distill.models.conditioning import call_unet
from distill.models.depth import Depth
from distill.models.families import MINI_FAMILY

DEPTH = Depth.parse("0,0/2,2/2,2:2:2,2,2/2,2,2/0,0,0")
ALPHAS = torch.linspace(0.99, 0.01, 1000)


def make_unet(depth: Depth) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**find_architecture(str(depth), MINI_FAMILY).unet_config).eval()


@pytest.fixture(scope="module")
def teacher() -> UNet2DConditionModel:
    return make_unet(DEPTH)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two pictures of 64 pixels."""
    torch.manual_seed(1)
    specs = {spec.name: spec for spec in MINI_FAMILY.unet_inputs(MINI_FAMILY.resolutions[0], 2)}
    text = {name: torch.randn(specs[name].shape) for name in ("encoder_hidden_states", "text_embeds")}
    return {"latents": torch.randn(2, 4, 8, 8), "time_ids": torch.zeros(2, 6), **text}


LAYER = {f"{side}.{kind}.1" for side in ("down_blocks.1", "up_blocks.1") for kind in ("resnets", "attentions")}
OUTER_LAYER = {"down_blocks.0.resnets.1", "up_blocks.2.resnets.1"}
CUTS = {
    "a block": {"down_blocks.2.attentions.1.transformer_blocks.0"},
    "the middle's attention": {"mid_block.attentions.0", "mid_block.resnets.1"},
    "the middle": {"mid_block"},
    "a layer": LAYER,
    "all of it": {"down_blocks.2.attentions.1.transformer_blocks.0", "mid_block", *LAYER, *OUTER_LAYER},
}


@pytest.mark.parametrize("removed", CUTS.values(), ids=CUTS)
@torch.no_grad()
def test_passing_modules_by_computes_what_the_student_computes(teacher, batch, removed: set[str]) -> None:
    """The student is made apart, its weights taken by its module map."""
    modules = student_after(DEPTH, removed)
    student, weights = make_unet(modules.student), teacher.state_dict()
    student.load_state_dict({name: weights[modules.source(name)] for name in student.state_dict()})
    inputs = {**batch, "sample": batch["latents"], "timestep": 500}
    before = call_unet(teacher, inputs)
    with passed_by(teacher, modules.dropped):
        without = call_unet(teacher, inputs)
    torch.testing.assert_close(without, call_unet(student, inputs), rtol=1e-4, atol=1e-5)
    assert not torch.equal(without, before)
    assert torch.equal(call_unet(teacher, inputs), before)


def test_a_score_is_kept_and_a_line_cut_short_is_not_one(teacher, batch, tmp_path: Path) -> None:
    kept, cut = tmp_path / "scores.jsonl", {"mid_block"}
    first = Quality(teacher, [batch], ALPHAS, (100, 900), kept)
    score = first.change(cut)
    assert score > 0 and first.computed == 1 and first.passes == 2
    with kept.open("a") as file:
        file.write('{"dropped": "half')
    again = Quality(teacher, [batch], ALPHAS, (100, 900), kept)
    assert again.change(cut) == score and again.computed == 0
    again.change(LAYER)
    last = Quality(teacher, [batch], ALPHAS, (100, 900), kept)
    assert last.change(LAYER) == again.change(LAYER) and last.computed == 0


@torch.no_grad()
def test_the_change_is_relative_to_the_output_at_each_noise_level(teacher, batch, tmp_path: Path) -> None:
    level = 300
    noise = torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(0))
    noisy = ALPHAS[level].sqrt() * batch["latents"] + (1 - ALPHAS[level]).sqrt() * noise
    inputs = {**batch, "sample": noisy, "timestep": level}
    whole = call_unet(teacher, inputs)
    with passed_by(teacher, {"mid_block"}):
        without = call_unet(teacher, inputs)
    expected = ((without - whole) ** 2).mean() / (whole**2).mean()
    score = Quality(teacher, [batch], ALPHAS, (level,), tmp_path / "scores.jsonl").change({"mid_block"})
    assert score == pytest.approx(expected.item())
