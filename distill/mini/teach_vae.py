"""Teaches the mini VAE on the shapes world, until the exact reader reads its reconstructions right.

A teacher can draw no colour or outline that its VAE loses, so this comes first, and only then is anything trained on
its latents.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel

from distill.common.progress import say
from distill.data.shapes import ATTRIBUTES, Scene, random_scene, render
from distill.mini.judge import share_followed
from distill.models.families import MINI_FAMILY
from distill.models.resolution import Resolution


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (batch, height, width, 3) to float (batch, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def _to_images(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def draw_pictures(count: int, resolution: Resolution, rng: np.random.Generator) -> tuple[list[Scene], np.ndarray]:
    scenes = [random_scene(rng) for _ in range(count)]
    return scenes, np.stack([render(scene, resolution, rng) for scene in scenes])


def _cosine(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _reads(vae: AutoencoderKL, rng: np.random.Generator, count: int = 32) -> dict[str, float]:
    """What the exact reader reads of the VAE's reconstructions, over all nine resolutions."""
    scenes, shares = 0, dict.fromkeys((*ATTRIBUTES, "all"), 0.0)
    for resolution in MINI_FAMILY.resolutions:
        some, images = draw_pictures(count, resolution, rng)
        with torch.no_grad():
            decoded = vae(to_tensor(images)).sample
        for attribute, share in share_followed(some, _to_images(decoded)).items():
            shares[attribute] += share * count
        scenes += count
    return {attribute: total / scenes for attribute, total in shares.items()}


def _crops(pool: np.ndarray, batch: int, side: int, rng: np.random.Generator) -> torch.Tensor:
    """Square crops (batch, 3, side, side): the VAE is convolutional, so crops teach it whole pictures. Each is the
    busiest of three, since most of a picture is plain background."""
    _, height, width, _ = pool.shape
    crops = []
    for index in rng.integers(0, len(pool), batch):
        corners = zip(rng.integers(0, height - side + 1, 3), rng.integers(0, width - side + 1, 3), strict=True)
        candidates = [pool[index, top : top + side, left : left + side] for top, left in corners]
        crops.append(max(candidates, key=lambda crop: int(crop[::4, ::4].std() * 100)))
    return to_tensor(np.stack(crops))


def _whole(pools: list[np.ndarray], batch: int, rng: np.random.Generator) -> torch.Tensor:
    """Whole pictures of one resolution: a group norm's statistics over a picture differ from those over a crop."""
    pool = pools[rng.integers(len(pools))]
    return to_tensor(pool[rng.integers(0, len(pool), batch)])


def _reconstruction_loss(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """L1 + 2 x MSE of (batch, 3, height, width), things and what is within 4 pixels of them weighing more: both sides
    of an outline alike, or points grow blunt and notches fill up."""
    is_thing = ((images - images[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.05).float()
    error = (decoded - images).abs()
    return ((error + 2 * error.square()) * (1 + 3 * F.max_pool2d(is_thing, 9, stride=1, padding=4))).mean()


def _train(
    vae: AutoencoderKL,
    parameters: Iterable[torch.nn.Parameter],
    loss_of: Callable[[int], torch.Tensor],
    out: Path,
    *,
    steps: int,
    learning_rate: float,
    title: str,
) -> None:
    """Trains `parameters` of `vae` on `loss_of(step)` and leaves their moving average in it; saves into `out/vae` as
    it goes."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, steps, min(100, steps // 10)))
    ema = EMAModel(parameters, decay=0.995)
    started = time.monotonic()
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 3.0)
        optimizer.step()
        schedule.step()
        ema.step(parameters)
        if (step + 1) % 200 == 0:
            ema.store(parameters)
            ema.copy_to(parameters)
            read = _reads(vae, np.random.default_rng(1), 16)
            vae.save_pretrained(out / "vae")
            ema.restore(parameters)
            words = " ".join(f"{name} {share:.3f}" for name, share in read.items())
            say(f"{title} {step + 1}/{steps} loss {loss.item():.4f} {time.monotonic() - started:.0f} s: {words}")
    ema.copy_to(parameters)
    vae.save_pretrained(out / "vae")


def teach_vae(out: Path, *, steps: int, whole_steps: int, batch: int = 16, seed: int = 0) -> AutoencoderKL:
    """Trains the mini VAE, `steps` on crops and `whole_steps` on whole pictures, and saves it under `out/vae`, its
    scaling factor measured from its own latents."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pools = [draw_pictures(1000, resolution, rng)[1] for resolution in MINI_FAMILY.resolutions]
    vae = AutoencoderKL(**MINI_FAMILY.vae)
    with torch.no_grad():  # begin with a narrow posterior: at its default width the noise drowns the means for long
        vae.quant_conv.weight[4:].zero_()
        vae.quant_conv.bias[4:].fill_(-5.0)

    def loss_of(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        return _reconstruction_loss(decoded, images) + 1e-5 * posterior.kl().mean() / 64

    def of_crops(step: int) -> torch.Tensor:
        small = step < 0.75 * steps
        return loss_of(_crops(pools[0], 2 * batch if small else batch, 32 if small else 64, rng))

    def of_whole(_: int) -> torch.Tensor:
        return loss_of(_whole(pools, batch // 2, rng))

    _train(vae, vae.parameters(), of_crops, out, steps=steps, learning_rate=8e-4, title="vae, crops")
    _train(vae, vae.parameters(), of_whole, out, steps=whole_steps, learning_rate=5e-4, title="vae, whole")
    with torch.no_grad():
        latents = torch.cat(
            [
                vae.encode(to_tensor(pools[0][i : i + 64])).latent_dist.mode()
                for i in range(0, min(512, len(pools[0])), 64)
            ]
        )
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.save_pretrained(out / "vae")
    say(f"vae: scaling factor {vae.config.scaling_factor}, reads {_reads(vae, np.random.default_rng(2))}")
    return vae


def polish_decoder(vae: AutoencoderKL, out: Path, *, steps: int, batch: int = 8, seed: int = 0) -> None:
    """Trains the decoder alone, so that latents keep their meaning and a UNet taught on them stays right."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    pools = []
    for resolution in MINI_FAMILY.resolutions:
        images = draw_pictures(400, resolution, rng)[1]
        with torch.no_grad():
            pools.append(
                (
                    images,
                    torch.cat(
                        [
                            vae.encode(to_tensor(images[i : i + 32])).latent_dist.mode()
                            for i in range(0, len(images), 32)
                        ]
                    ),
                )
            )

    def loss_of(_: int) -> torch.Tensor:
        images, latents = pools[rng.integers(len(pools))]
        chosen = rng.integers(0, len(images), batch)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(latents[chosen] + 0.05 * torch.randn_like(latents[chosen])).sample.float()
        return _reconstruction_loss(decoded, to_tensor(images[chosen]))

    decoder = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    _train(vae, decoder, loss_of, out, steps=steps, learning_rate=5e-4, title="decoder")
    say(f"decoder: reads {_reads(vae, np.random.default_rng(2))}")
