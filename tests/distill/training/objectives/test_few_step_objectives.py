"""Each few-step objective against its equations: on numbers worked by hand, or against diffusers' own schedulers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler, StableDiffusionXLPipeline

from distill.common.errors import UserError
from distill.common.validation import from_json
from distill.models.architectures import SDXL_DEPTH
from distill.models.module_map import make_module_map
from distill.training.objectives import Consistency, Guidance, GuidanceRange, Halving, Objective
from distill.training.objectives.consistency import boundary_scalings, consistency
from distill.training.objectives.diffusion import CLEAN, Levels, trailing_timesteps
from distill.training.objectives.guidance_range import guidance_embedding, guided
from distill.training.objectives.halving import one_step_target
from distill.training.objectives.interface import Batch, Nets

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""SDXL's."""
ALPHAS = DDPMScheduler(**BETAS).alphas_cumprod
PREDICTIONS = ("epsilon", "v_prediction")


def _nets(prediction_type: str = "epsilon", *, width: int | None = None, target: Any = None) -> Nets:
    return Nets(
        student=None,
        teacher=SimpleNamespace(config=SimpleNamespace(time_cond_proj_dim=width)),
        modules=make_module_map("first", SDXL_DEPTH, SDXL_DEPTH),
        alphas_cumprod=ALPHAS,
        unconditional={"encoder_hidden_states": torch.zeros(2, 3)},
        prediction_type=prediction_type,
        target=target,
    )


def _batch(objective: Objective, size: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(1)
    drawn = objective.draw(size, len(ALPHAS), generator)
    signal = ALPHAS[drawn["timestep"]].view(-1, 1, 1, 1)
    clean, noise = (torch.randn(size, 4, 2, 2, generator=generator) for _ in range(2))
    text = torch.randn(size, 2, 3, generator=generator)
    sample = signal.sqrt() * clean + (1 - signal).sqrt() * noise
    return drawn | {"sample": sample, "noise": noise, "encoder_hidden_states": text}


def _unet(factor: float) -> Any:
    """A stand-in for a UNet, which depends on everything that it is given."""

    def predict(batch: Batch) -> torch.Tensor:
        text = batch["encoder_hidden_states"].mean((1, 2)).view(-1, 1, 1, 1)
        told = batch["timestep_cond"].mean(1).view(-1, 1, 1, 1) if "timestep_cond" in batch else 0.0
        return factor * batch["sample"] + text + told + batch["timestep"].view(-1, 1, 1, 1) / 1000

    return predict


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_ddim_goes_the_way_of_diffusers(prediction_type: str, steps: int) -> None:
    scheduler = DDIMScheduler(
        **BETAS, prediction_type=prediction_type, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == trailing_timesteps(1000, steps).tolist()
    levels, sample = Levels(_nets(prediction_type)), torch.randn(2, 4, 2, 2)
    for t, s in zip(scheduler.timesteps, [*scheduler.timesteps[1:], CLEAN], strict=True):
        prediction = torch.randn(2, 4, 2, 2)
        noised = levels.at(sample, torch.full((2,), int(t)))
        theirs = scheduler.step(prediction, t, sample)
        torch.testing.assert_close(noised.clean(prediction), theirs.pred_original_sample, atol=1e-4, rtol=1e-4)
        sample = levels.ddim_step(noised, prediction, torch.full((2,), int(s))).sample
        torch.testing.assert_close(sample, theirs.prev_sample, atol=1e-4, rtol=1e-4)


def test_a_consistent_picture_is_what_diffusers_lcm_scheduler_takes() -> None:
    scheduler = LCMScheduler(**BETAS, prediction_type="epsilon", clip_sample=False)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        sample, prediction = torch.randn(2, 4, 2, 2).unbind(0)
        scheduler._step_index = None
        theirs = scheduler.step(prediction[None], t, sample[None]).denoised
        ours = consistency(Levels(_nets()).at(sample[None], t[None]), prediction[None])
        torch.testing.assert_close(ours, theirs)
    c_skip, c_out = boundary_scalings(torch.tensor([0]))
    assert (c_skip.item(), c_out.item()) == (1.0, 0.0), "at no noise the picture is the sample itself"


def test_w_is_embedded_as_diffusers_pipelines_embed_it() -> None:
    w = torch.tensor([0.0, 0.5, 7.0])
    theirs = StableDiffusionXLPipeline.get_guidance_scale_embedding(None, w, embedding_dim=256)
    torch.testing.assert_close(guidance_embedding(w, 256), theirs)


def test_guidance_takes_two_passes_of_a_teacher_or_one_of_one_that_is_told_w() -> None:
    """For a batch of any size; the prompt alone is taken away."""
    for size in (5, 2):
        batch = _batch(Guidance(), size)
        w = batch["guidance"].view(-1, 1, 1, 1)
        cond = _unet(0.5)(batch)
        uncond = _unet(0.5)({**batch, "encoder_hidden_states": torch.zeros(size, 2, 3)})
        torch.testing.assert_close(guided(_nets(), _unet(0.5), batch), (1 + w) * cond - w * uncond)
        told = {**batch, "timestep_cond": guidance_embedding(batch["guidance"], 8)}
        torch.testing.assert_close(guided(_nets(width=8), _unet(0.5), batch), _unet(0.5)(told))


@pytest.mark.parametrize("distance", ["l2", "huber"])
def test_consistency_is_its_equations(distance: str) -> None:
    """Again by a scalar at a time, in numpy."""
    objective = Consistency(distance=distance, guidance=GuidanceRange(low=3.0, high=15.0, embedding=8))
    batch = _batch(objective)
    student, teacher, target = _unet(0.4), _unet(0.5), _unet(0.45)
    with objective.prepare(_nets(target=target)) as terms:
        loss = terms(student, teacher, batch, 0)["consistency"].item()
    told = {**batch, "timestep_cond": guidance_embedding(batch["guidance"], 8)}
    nothing = {**batch, "encoder_hidden_states": torch.zeros_like(batch["encoder_hidden_states"])}
    cond, uncond, t = teacher(batch), teacher(nothing), batch["timestep"]
    assert set(((t + 1) % 20).tolist()) == {0} and t.min() >= 19 and t.max() <= 999
    s = (t - 20).clamp_min(0)
    w = batch["guidance"]
    prediction = cond + w.view(-1, 1, 1, 1) * (cond - uncond)
    alpha = [(math.sqrt(ALPHAS[int(i)]), math.sqrt(1 - ALPHAS[int(i)])) for i in range(1000)]
    earlier = torch.stack(
        [
            alpha[s[i]][0] * (batch["sample"][i] - alpha[t[i]][1] * prediction[i]) / alpha[t[i]][0]
            + alpha[s[i]][1] * prediction[i]
            for i in range(5)
        ]
    )

    def f(noise_pred: torch.Tensor, sample: torch.Tensor, timestep: torch.Tensor) -> np.ndarray:
        rows = []
        for i in range(5):
            a, b = alpha[timestep[i]]
            scaled = 10 * timestep[i].item()
            c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)
            rows.append(c_skip * sample[i] + c_out * (sample[i] - b * noise_pred[i]) / a)
        return torch.stack(rows).double().numpy()

    difference = f(student(told), batch["sample"], t) - f(
        target({**told, "sample": earlier, "timestep": s}), earlier, s
    )
    expected = difference**2 if distance == "l2" else np.sqrt(difference**2 + 1e-6) - 1e-3
    assert loss == pytest.approx(expected.mean(), rel=1e-3)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_one_step_to_the_target_of_halving_is_two_of_the_teacher(prediction_type: str) -> None:
    """A student that predicts x̃ lands by diffusers' DDIM where its teacher does in twice the steps, and has no loss."""
    steps = 4
    nets, objective = _nets(prediction_type), Halving(steps=steps)
    levels, batch, teacher = Levels(nets), _batch(objective, 20), _unet(0.5)
    begin = levels.at(batch["sample"], batch["timestep"])
    halfway = levels.ddim_step(begin, teacher(batch), batch["halfway"])
    end = levels.ddim_step(
        halfway, teacher({**batch, "sample": halfway.sample, "timestep": batch["halfway"]}), batch["end"]
    )
    clean = one_step_target(begin, end)
    noise = (begin.sample - begin.alpha * clean) / begin.sigma
    perfect = noise if prediction_type == "epsilon" else begin.alpha * noise - begin.sigma * clean
    with objective.prepare(nets) as terms:
        assert terms(lambda _batch: perfect, teacher, batch, 0)["halving"].item() == pytest.approx(0, abs=1e-4)
    scheduler = DDIMScheduler(
        **BETAS, prediction_type=prediction_type, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    scheduler.set_timesteps(steps)
    for i, t in enumerate(batch["timestep"]):
        landed = scheduler.step(perfect[i], int(t), batch["sample"][i]).prev_sample
        torch.testing.assert_close(landed, end.sample[i], atol=1e-3, rtol=1e-3)
    assert set(batch["timestep"].tolist()) == {999, 749, 499, 249}
    assert {(a, b) for a, b in zip(batch["timestep"].tolist(), batch["end"].tolist(), strict=True)} == {
        (999, 749),
        (749, 499),
        (499, 249),
        (249, CLEAN),
    }


def test_halving_weighs_by_the_truncated_snr() -> None:
    """By hand: α² = 0.8 weighs 4, α² = 0.2 weighs 1."""
    alphas = torch.tensor([0.8, 0.2])
    levels = Levels(Nets(**{**vars(_nets()), "alphas_cumprod": alphas}))
    weight = levels.at(torch.zeros(2, 4, 1, 1), torch.tensor([0, 1])).truncated_snr
    assert weight.tolist() == pytest.approx([4.0, 1.0])
    begin = levels.at(torch.full((1, 4, 1, 1), 2.0), torch.tensor([1]))
    end = levels.at(torch.full((1, 4, 1, 1), 1.5), torch.tensor([0]))
    ratio = math.sqrt(0.2 / 0.8)
    by_hand = (1.5 - ratio * 2.0) / (math.sqrt(0.8) - ratio * math.sqrt(0.2))
    assert one_step_target(begin, end).flatten().tolist() == pytest.approx([by_hand] * 4)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_guidance_is_taught_in_one_pass(prediction_type: str) -> None:
    objective = Guidance(guidance=GuidanceRange(low=1.0, high=9.0, embedding=8))
    nets, batch, teacher = _nets(prediction_type), _batch(objective), _unet(0.5)
    assert batch["guidance"].min() >= 1 and batch["guidance"].max() <= 9
    perfect = guided(nets, teacher, batch)
    seen = []

    def student(told: Batch) -> torch.Tensor:
        seen.append(told["timestep_cond"])
        return perfect + 0.1

    with objective.prepare(nets) as terms:
        loss = terms(student, teacher, batch, 0)["guidance"].item()
    torch.testing.assert_close(seen[0], guidance_embedding(batch["guidance"], 8))
    signal = ALPHAS[batch["timestep"]].double()
    error = 0.1 * (1 - signal).sqrt() / (signal.sqrt() if prediction_type == "epsilon" else 1)
    assert loss == pytest.approx((error.square() * (signal / (1 - signal)).clamp_min(1)).mean().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"kind": "guidance", "guidance": {"low": 9, "high": 1}}, "the range of w is reversed: low 9 is above high 1"),
        ({"kind": "guidance", "guidance": {"low": 1, "high": 9, "embedding": None}}, "learns one w: low and high"),
        ({"kind": "consistency", "guidance": {"low": -1, "high": 9}}, "greater than or equal to 0"),
        ({"kind": "consistency", "target_decay": 1.0}, "less than 1"),
        ({"kind": "halving"}, "halving.steps: field required"),
        ({"kind": "halving", "steps": 0}, "halving.steps: input should be greater than 0"),
        ({"kind": "lcm"}, "does not match any of the expected tags"),
    ],
)
def test_an_objective_that_cannot_be_is_one_line(stated: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(Objective, stated)


@pytest.mark.parametrize(
    ("objective", "prediction_type", "message"),
    [
        (Consistency(), "v_prediction", "predicts 'v_prediction'; the objective 'consistency' needs one that predicts"),
        (Guidance(), "sample", "needs one that predicts 'epsilon' or 'v_prediction'"),
        (Halving(steps=501), "epsilon", r"501 steps are 1002 of the teacher, more than its schedule has \(1000\)"),
        (Consistency(solver_steps=1001), "epsilon", r"1001, more than the teacher's schedule has \(1000\)"),
    ],
)
def test_a_teacher_that_cannot_serve_is_one_line(objective: Objective, prediction_type: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        objective.check(prediction_type, 1000)
