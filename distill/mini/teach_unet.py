"""Teaches a mini UNet and its text encoders together, on the latents of the shapes world."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel

from distill.common.progress import say
from distill.mini.teach_vae import draw_pictures, to_tensor
from distill.models.conditioning import call_unet
from distill.models.families import Family
from distill.models.resolution import Resolution


def _latent_pool(
    vae: AutoencoderKL, resolutions: Sequence[Resolution], per_resolution: int, seed: int
) -> list[tuple[Resolution, list[str], torch.Tensor]]:
    """For each resolution its captions and scaled latents (count, 4, height / 8, width / 8)."""
    rng = np.random.default_rng(seed)
    pool = []
    for resolution in resolutions:
        scenes, images = draw_pictures(per_resolution, resolution, rng)
        with torch.inference_mode():
            chunks = [vae.encode(to_tensor(images[i : i + 16])).latent_dist.mode() for i in range(0, len(images), 16)]
        latents = torch.cat(chunks).clone() * vae.config.scaling_factor
        pool.append((resolution, [scene.caption for scene in scenes], latents))
        say(f"latents of {resolution}: {len(scenes)}")
    return pool


def _batches(pool: list, batch: int, rng: np.random.Generator) -> Iterator[tuple[Resolution, list[str], torch.Tensor]]:
    """Every picture once an epoch, each batch of one resolution, in random order."""
    while True:
        order = []
        for bucket, (_, captions, _) in enumerate(pool):
            indices = rng.permutation(len(captions))
            order += [(bucket, indices[i : i + batch]) for i in range(0, len(indices) - batch + 1, batch)]
        for which in rng.permutation(len(order)):
            bucket, indices = order[which]
            resolution, captions, latents = pool[bucket]
            yield resolution, [captions[i] for i in indices], latents[indices]


_SAVE_EVERY = 300.0  # seconds


def _loss_weights(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Weight of the noise's squared error at each timestep (1000,): min(SNR + 1, 5) / SNR within [0.5, 25], mean 1.

    What stands where is settled at high noise, where an error in the picture is small as an error in the noise: the
    plain mean square hardly sees it. `teach_unet` lets these weights fade into it, which outlines need. The cap of 5
    is min-SNR's (arXiv 2303.09556), the + 1 that of v-prediction.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weights = ((snr + 1).clamp(max=5) / snr).clamp(0.5, 25)
    return weights / weights.mean()


class _Progress:
    """What `teach_unet` needs to go on after being killed: one file, replaced whole."""

    def __init__(self, path: Path, taught: dict[str, torch.nn.Module]) -> None:
        self.path = path
        self.taught = taught
        self.seconds = 0.0
        self.step = 0

    def load(self, optimizer: torch.optim.Optimizer, ema: EMAModel) -> None:
        if not self.path.exists():
            return
        state = torch.load(self.path, weights_only=True)
        for name, weights in state["weights"].items():
            self.taught[name].load_state_dict(weights)
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        self.seconds, self.step = state["seconds"], state["step"]
        say(f"unet: going on at step {self.step}, {self.seconds:.0f} s")

    def save(self, optimizer: torch.optim.Optimizer, ema: EMAModel) -> None:
        state = {
            "weights": {name: network.state_dict() for name, network in self.taught.items()},
            "optimizer": optimizer.state_dict(),
            "ema": ema.state_dict(),
            "seconds": self.seconds,
            "step": self.step,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)


def teach_unet(
    pipe: Any,
    family: Family,
    out: Path,
    *,
    minutes: float,
    learning_rate: float = 8e-4,
    batch: int = 32,
    pictures: int = 10_800,
    seed: int = 0,
) -> None:
    """Trains the UNet and the text encoders of `pipe` on the task loss for `minutes`; `pictures` are shared out over
    the family's resolutions.

    The learning rate falls with the time used, so the schedule is whole however fast the machine is. Killed, it goes
    on from `out/teach.state`, which is written as it goes.
    """
    torch.manual_seed(seed)
    conditioning = family.conditioning
    pool = _latent_pool(pipe.vae.eval(), family.resolutions, pictures // len(family.resolutions), seed)
    unet = pipe.unet.train()
    taught = {name: getattr(pipe, name) for name in ("unet", *conditioning.encoders)}
    parameters = [parameter for network in taught.values() for parameter in network.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    ema = EMAModel(parameters, decay=0.999, foreach=True)
    state = _Progress(out / "teach.state", taught)
    state.load(optimizer, ema)
    rng = np.random.default_rng([seed, state.step])
    torch.manual_seed(seed + state.step)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, 0).float()
    weights = _loss_weights(alphas_cumprod)
    batches = _batches(pool, batch, rng)
    losses: list[float] = []
    next_save = state.seconds + _SAVE_EVERY
    while (used := state.seconds / (60 * minutes)) < 1:
        started = time.monotonic()
        resolution, captions, latents = next(batches)
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, (state.step + 1) / 200) * (1 - 0.99 * used)
        text, no_text = conditioning.encode(pipe, captions), conditioning.unconditional(pipe)
        kept = torch.rand(batch) >= 0.1
        timesteps = torch.randint(0, 1000, (batch,))
        signal = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise = torch.randn_like(latents)
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        size = (resolution.height, resolution.width)
        inputs = conditioning.size_inputs([size] * batch, [(0, 0)] * batch, [resolution] * batch)
        for name, value in text.items():
            inputs[name] = torch.where(kept.view(-1, *[1] * (value.dim() - 1)), value, no_text[name])
        noise_pred = call_unet(unet, {"sample": noisy, "timestep": timesteps, **inputs})
        error = (noise_pred - noise).square().mean((1, 2, 3))
        optimizer.zero_grad()
        (weights[timesteps] ** (1 - used) * error).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.step(parameters)
        losses.append(error.mean().item())
        state.step += 1
        state.seconds += time.monotonic() - started
        if state.step % 50 == 0:
            say(f"unet step {state.step} mse {np.mean(losses[-50:]):.4f} {state.seconds:.0f} of {60 * minutes:.0f} s")
        if state.seconds > next_save:
            next_save += _SAVE_EVERY
            state.save(optimizer, ema)
    ema.copy_to(parameters)
    unet.eval()
    pipe.save_pretrained(out, safe_serialization=True)
    state.path.unlink(missing_ok=True)
