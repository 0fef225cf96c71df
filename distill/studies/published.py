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
from distill.models.architectures import Depth
from distill.training.pair import Pair
from distill.training.taps import Tap, make_taps


@contextmanager
def published_steps(pair: Pair, pipe: Any, samples: Sequence[Sample]) -> Iterator[Callable[[], float]]:
    """A function that takes one step over `samples`, of one resolution and encoded by `pipe`, and returns its loss."""
    accelerator, teacher = pair.accelerator, pair.teacher
    device = accelerator.device
    optimizer = pair.optimizer.optimizer  # without accelerate's wrapper
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    depth, student_depth = (Depth.from_config(net.config) for net in (teacher, pair.student))
    taps = make_taps("sub-block", depth, student_depth, pair.layer_map)
    captions = [sample.caption for sample in samples]

    def step() -> float:
        pixels = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2)
        with torch.no_grad():
            posterior = pipe.vae.encode(pixels.to(device).float() / 127.5 - 1).latent_dist
            latents = (posterior.sample() * pipe.vae.config.scaling_factor).to(teacher.dtype)
            states, pooled = [], None
            for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
                length = tokenizer.model_max_length
                tokens = tokenizer(
                    captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
                )
                encoded = encoder(tokens.input_ids.to(device), output_hidden_states=True)
                states.append(encoded.hidden_states[-2])
                pooled = encoded[0]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        time_ids = torch.tensor([sample.time_ids for sample in samples], device=device)
        inputs = {
            "encoder_hidden_states": torch.cat(states, dim=-1),
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids},
        }
        with accelerator.autocast():
            noise_pred = pair.model(noisy, timesteps, **inputs).sample
        with torch.no_grad():
            teacher_pred = teacher(noisy, timesteps, **inputs).sample
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
