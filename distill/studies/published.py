"""The training step of the published trainers, made again on today's libraries by its description.

The VAE and both text encoders are at work in every step, hooks keep every sub-block's output of student and teacher, the
feature errors are raw, the optimiser is stepped as it comes, nothing is clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch.nn import functional

from distill.data.pictures import Sample
from distill.models.conditioning import call_unet, conditioning_of
from distill.training.objectives.taps import Tap, make_taps
from distill.training.step import Pair


def encoding_in_each_step(pair: Pair, pipe: Any, samples: Sequence[Sample]) -> Callable[[], tuple[torch.Tensor, dict]]:
    """A function that encodes `samples` anew: the latents (batch, 4, height / 8, width / 8) in the teacher's dtype, and the
    text and size inputs by name."""
    device = pair.accelerator.device
    captions = [sample.caption for sample in samples]
    conditioning = conditioning_of(pair.teacher.config)
    size_inputs = conditioning.size_inputs(
        [sample.original_size for sample in samples],
        [sample.crop_top_left for sample in samples],
        [sample.resolution for sample in samples],
    )

    def encode() -> tuple[torch.Tensor, dict]:
        pixels = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2)
        with torch.no_grad():
            posterior = pipe.vae.encode(pixels.to(device).float() / 127.5 - 1).latent_dist
            latents = (posterior.sample() * pipe.vae.config.scaling_factor).to(pair.teacher.dtype)
            text = conditioning.encode(pipe, captions)
        return latents, {**text, **{name: value.to(device) for name, value in size_inputs.items()}}

    return encode


@contextmanager
def published_steps(pair: Pair, pipe: Any, samples: Sequence[Sample]) -> Iterator[Callable[[], float]]:
    """A function that takes one step over `samples`, of one resolution and encoded by `pipe`, and returns its loss."""
    accelerator, teacher = pair.accelerator, pair.teacher
    device = accelerator.device
    optimizer = pair.optimizer.optimizer  # without accelerate's wrapper
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    taps = make_taps("sub-block", pair.modules)
    encode = encoding_in_each_step(pair, pipe, samples)

    def step() -> float:
        latents, text = encode()
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        inputs = {"sample": noisy, "timestep": timesteps, **text}
        with accelerator.autocast():
            noise_pred = call_unet(pair.model, inputs)
        with torch.no_grad():
            teacher_pred = call_unet(teacher, inputs)
        loss = functional.mse_loss(noise_pred.float(), noise.float())
        loss = loss + 0.5 * functional.mse_loss(noise_pred.float(), teacher_pred.float())
        pairs = ((of_student[tap.student], of_teacher[tap.teacher]) for tap in taps)
        loss = loss + 0.5 * sum(functional.mse_loss(ours, theirs) for ours, theirs in pairs)
        accelerator.backward(loss)
        if scaler := accelerator.scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()
        return accelerator.gather(loss.detach().repeat(len(latents))).mean().item()

    with raw_hooks(pair.student, teacher, taps) as (of_student, of_teacher):
        yield step


@contextmanager
def raw_hooks(student: Any, teacher: Any, taps: Sequence[Tap]) -> Iterator[tuple[dict, dict]]:
    """Hooks that keep every output until the next step overwrites it, as the published script's do."""
    features: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})

    def keep(kept: dict[str, torch.Tensor], path: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            kept[path] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    paths = {student: [tap.student for tap in taps], teacher: [tap.teacher for tap in taps]}
    handles = [
        net.get_submodule(path).register_forward_hook(keep(kept, path))
        for (net, of_net), kept in zip(paths.items(), features, strict=True)
        for path in of_net
    ]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()
