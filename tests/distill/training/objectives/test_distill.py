"""Each loss against its equation, and each defect of the published trainers as a test that it cannot happen here."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from distill.common.errors import UserError
from distill.models.architectures import ARCHITECTURES, SDXL_DEPTH, SSD_1B_DEPTH, find_architecture, whole
from distill.models.depth import Depth
from distill.models.families import MINI_FAMILY, MINI_SD_FAMILY, Family
from distill.models.module_map import make_module_map
from distill.training.memory import count_memory
from distill.training.objectives import Distill
from distill.training.objectives.distill import (
    feature_loss,
    feature_losses,
    min_snr_weight,
    prediction_loss,
    task_target,
)
from distill.training.objectives.taps import LEVELS, FeatureRecorder, Tap, make_taps
from distill.training.recipes import find_recipe
from distill.training.student import Pruned


def test_half_precision_errors_do_not_overflow() -> None:
    far = torch.full((1, 4), 300.0, dtype=torch.float16)
    assert feature_loss(far, torch.zeros_like(far), normalize=False).item() == 90_000


def test_normalized_features_have_no_scale() -> None:
    student, teacher = torch.randn(2, 8), torch.randn(2, 8)
    small, large = (feature_loss(s * student, s * teacher, normalize=True) for s in (0.01, 512.0))
    assert small.item() == pytest.approx(large.item(), rel=1e-4)


def test_min_snr_weighs_as_its_equation_and_keeps_the_output_term() -> None:
    alphas = torch.tensor([0.99, 0.5, 0.01])
    weight = min_snr_weight(alphas, torch.tensor([0, 1, 2]), gamma=5.0)
    assert weight.tolist() == pytest.approx([5 / 99, 1.0, 1.0], rel=1e-4)
    pred, target = torch.zeros(3, 4, 2, 2), torch.ones(3, 4, 2, 2)
    assert prediction_loss(pred, target, weight).item() == pytest.approx(weight.mean().item())


def test_a_teacher_of_velocities_is_taught_by_velocities() -> None:
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    latents, noise, timestep = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    batch = {"sample": scheduler.add_noise(latents, noise, timestep), "noise": noise, "timestep": timestep}
    target = task_target(batch, scheduler.alphas_cumprod, "v_prediction")
    torch.testing.assert_close(target, scheduler.get_velocity(latents, noise, timestep), atol=1e-3, rtol=1e-3)
    assert task_target(batch, scheduler.alphas_cumprod, "epsilon") is noise
    weight = min_snr_weight(torch.tensor([0.99, 0.5]), torch.tensor([0, 1]), 5.0, "v_prediction")
    assert weight.tolist() == pytest.approx([5 / 100, 0.5], rel=1e-4)  # arXiv 2303.09556: min(SNR, γ) / (SNR + 1)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    feature_losses([Tap("a", "b")], {"a": student}, {"b": teacher}, normalize=True)["a"].backward()
    assert teacher.grad is None and student.grad is not None


def test_sub_block_level_has_the_published_26_terms() -> None:
    taps = make_taps("sub-block", make_module_map("first", SDXL_DEPTH, SSD_1B_DEPTH))
    assert len(taps) == 26
    assert Tap("mid_block.resnets.0", "mid_block") in taps


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["ssd-1b", "vega"])
def test_every_tap_names_a_module_of_both_nets(level: str, name: str) -> None:
    student_depth = ARCHITECTURES[name].depth
    with torch.device("meta"):
        teacher = UNet2DConditionModel(**ARCHITECTURES["sdxl"].unet_config)
        student = UNet2DConditionModel(**ARCHITECTURES[name].unet_config)
    taps = make_taps(level, make_module_map("similarity", SDXL_DEPTH, student_depth))
    assert len({tap.student for tap in taps}) == len(taps)
    for tap in taps:
        student.get_submodule(tap.student)
        teacher.get_submodule(tap.teacher)


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(UserError, match="self-attention"):
        make_taps("pixel", make_module_map("first", SDXL_DEPTH, SSD_1B_DEPTH))


def _call(unet: UNet2DConditionModel) -> torch.Tensor:
    added = {"text_embeds": torch.randn(1, 64), "time_ids": torch.zeros(1, 6)}
    return unet(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 4, 128), added_cond_kwargs=added).sample


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_features_carry_gradients_with_and_without_checkpointing(level: str, checkpointing: bool) -> None:
    architecture = ARCHITECTURES["mini-vega"]
    unet = UNet2DConditionModel(**architecture.unet_config).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    depth = architecture.depth
    taps = make_taps(level, make_module_map("first", depth, depth))
    recorder = FeatureRecorder(unet, [tap.student for tap in taps])
    with recorder.recording():
        _call(unet)
    before = dict(recorder.features)
    assert before.keys() == {tap.student for tap in taps}
    torch.stack([feature.float().square().mean() for feature in before.values()]).sum().backward()
    assert unet.conv_in.weight.grad is not None and unet.conv_in.weight.grad.abs().sum() > 0
    assert all(recorder.features[name] is feature for name, feature in before.items()), "backward recorded again"


def _step_on_meta(depth: Depth, family: Family, objective: Distill) -> None:
    """Taps of a student of this depth, on the step that is run on meta tensors to count its memory."""
    student = Pruned(architecture=str(depth))
    count_memory(whole(family), student, objective, resolution=family.resolutions[0], micro_batch=1)


@pytest.mark.parametrize("name", ["small-sd", "tiny-sd", "bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny", "koala-700m"])
def test_published_taps_are_modules_of_both_nets_with_features_of_one_shape(name: str) -> None:
    [stage] = find_recipe(name).stages
    student = find_architecture(stage.student.architecture)
    _step_on_meta(student.depth, {"sd-1": MINI_SD_FAMILY, "sdxl": MINI_FAMILY}[student.family.name], stage.objective)


@pytest.mark.parametrize(
    ("taps", "told"),
    [
        ({"mid_block": "mid_block"}, "there is no module 'mid_block' in UNet2DConditionModel of this depth"),
        ({"up_blocks.0": "up_blocks.0"}, r"the student's up_blocks.0 gives features \(64, 8, 8\), the teacher's"),
    ],
)
def test_taps_that_cannot_be_compared_are_refused(taps: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        _step_on_meta(ARCHITECTURES["mini-tiny-sd"].depth, MINI_SD_FAMILY, Distill(taps=taps))
