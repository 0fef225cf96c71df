"""The step of diffusers' LCM script, made again by its description (examples/consistency_distillation, SDXL on shards).

The VAE and both text encoders are at work in every step, the teacher is asked with and without the prompt, and the target
moves parameter by parameter after the optimiser. The student is not told w, here and in the trainer's loop beside this one:
so both train the same net.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch

from distill.data.pictures import Sample
from distill.models.conditioning import call_unet
from distill.studies.published import encoding_in_each_step
from distill.training.objectives.consistency import consistency
from distill.training.objectives.diffusion import Levels
from distill.training.objectives.interface import Nets
from distill.training.step import Pair

SOLVER_STEPS, W_LOW, W_HIGH, HUBER_C, DECAY = 50, 3.0, 15.0, 0.001, 0.95


@contextmanager
def published_lcm_steps(pair: Pair, pipe: Any, samples: Sequence[Sample]) -> Iterator[Callable[[], float]]:
    """A function that takes one step over `samples`, of one resolution and encoded by `pipe`, and returns its loss."""
    accelerator, teacher, device = pair.accelerator, pair.teacher, pair.accelerator.device
    optimizer = pair.optimizer.optimizer  # without accelerate's wrapper
    encode = encoding_in_each_step(pair, pipe, samples)
    target = deepcopy(pair.student).requires_grad_(False)
    nets = Nets(
        student=pair.student,
        teacher=teacher,
        modules=pair.modules,
        alphas_cumprod=pair.alphas_cumprod.to(device),
        unconditional=pair.unconditional,
        prediction_type=pair.prediction_type,
    )
    levels = Levels(nets)
    stride = len(pair.alphas_cumprod) // SOLVER_STEPS

    def step() -> float:
        latents, text = encode()
        noise = torch.randn_like(latents)
        timestep = stride * torch.randint(1, SOLVER_STEPS + 1, (len(latents),), device=device) - 1
        w = torch.empty(len(latents), 1, 1, 1, device=device).uniform_(W_LOW, W_HIGH)
        clean = levels.at(latents, timestep)
        later = levels.at(clean.alpha * latents.float() + clean.sigma * noise.float(), timestep)
        inputs = {"sample": later.sample.to(latents.dtype), "timestep": timestep, **text}
        with accelerator.autocast():
            reached = consistency(later, call_unet(pair.model, inputs))
        with torch.no_grad():
            cond = call_unet(teacher, inputs)
            uncond = call_unet(teacher, nets.unprompted(inputs))
            s = (timestep - stride).clamp_min(0)
            earlier = levels.ddim_step(later, cond.float() + w * (cond.float() - uncond.float()), s)
            with accelerator.autocast():
                told = call_unet(target, {**inputs, "sample": earlier.sample, "timestep": s})
            wanted = consistency(earlier, told)
        loss = (((reached - wanted).square() + HUBER_C**2).sqrt() - HUBER_C).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(pair.model.parameters(), 1.0)
        if scaler := accelerator.scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, own in zip(target.parameters(), pair.student.parameters(), strict=True):
                average.mul_(DECAY).add_(own, alpha=1 - DECAY)
        return accelerator.gather(loss.detach().repeat(len(latents))).mean().item()

    yield step
