"""Makes the mini teacher: a VAE, then a UNet and both text encoders together, on the shapes world.

The order matters. A teacher can draw no colour or outline that its VAE loses, so the VAE is taught until the exact
reader reads its reconstructions right, and only then is anything trained on its latents. Everything here happens
once, on the machine of whoever makes a new teacher; the distillation of students is `trainer.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from distill.architectures import ARCHITECTURES, MINI_FAMILY, Resolution
from distill.progress import say
from distill.shapes import ATTRIBUTES, WORDS, Scene, follows, random_scene, render
from distill.tokenizer import make_clip_tokenizer


def _to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (batch, height, width, 3) to float (batch, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def _to_images(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def _pictures(count: int, resolution: Resolution, rng: np.random.Generator) -> tuple[list[Scene], np.ndarray]:
    scenes = [random_scene(rng) for _ in range(count)]
    return scenes, np.stack([render(scene, resolution, rng) for scene in scenes])


def share_followed(scenes: list[Scene], images: Sequence[np.ndarray] | np.ndarray) -> dict[str, float]:
    """For each attribute, and for `all` together, the share of pictures that show what their scene says."""
    results = [follows(scene, image) for scene, image in zip(scenes, images, strict=True)]
    shares = {attribute: float(np.mean([result[attribute] for result in results])) for attribute in ATTRIBUTES}
    return shares | {"all": float(np.mean([all(result.values()) for result in results]))}


def _cosine(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _reads(vae: AutoencoderKL, rng: np.random.Generator, count: int = 32) -> dict[str, float]:
    """What the exact reader reads of the VAE's reconstructions, over all nine resolutions."""
    scenes, shares = 0, dict.fromkeys((*ATTRIBUTES, "all"), 0.0)
    for resolution in MINI_FAMILY.resolutions:
        some, images = _pictures(count, resolution, rng)
        with torch.no_grad():
            decoded = vae(_to_tensor(images)).sample
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
    return _to_tensor(np.stack(crops))


def _whole(pools: list[np.ndarray], batch: int, rng: np.random.Generator) -> torch.Tensor:
    """Whole pictures of one resolution: a group norm's statistics over a picture differ from those over a crop."""
    pool = pools[rng.integers(len(pools))]
    return _to_tensor(pool[rng.integers(0, len(pool), batch)])


def _reconstruction_loss(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """L1 + 2 x MSE of (batch, 3, height, width), things weighing four times the background."""
    is_thing = (images - images[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.05
    error = (decoded - images).abs()
    return ((error + 2 * error.square()) * (1 + 3 * is_thing.float())).mean()


def _train_vae(
    vae: AutoencoderKL, draw: Callable[[int], torch.Tensor], out: Path, *, steps: int, learning_rate: float, title: str
) -> None:
    """Trains the whole VAE on `draw(step)`, with a little KL; saves into `out/vae` as it goes."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, steps, 100))
    ema = EMAModel(vae.parameters(), decay=0.995)
    started = time.monotonic()
    for step in range(steps):
        images = draw(step)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        loss = _reconstruction_loss(decoded, images) + 1e-5 * posterior.kl().mean() / 64
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 3.0)
        optimizer.step()
        schedule.step()
        ema.step(vae.parameters())
        if (step + 1) % 200 == 0:
            ema.store(vae.parameters())
            ema.copy_to(vae.parameters())
            read = _reads(vae, np.random.default_rng(1), 16)
            vae.save_pretrained(out / "vae")
            ema.restore(vae.parameters())
            words = " ".join(f"{name} {share:.3f}" for name, share in read.items())
            say(f"{title} {step + 1}/{steps} loss {loss.item():.4f} {time.monotonic() - started:.0f} s: {words}")
    ema.copy_to(vae.parameters())


def teach_vae(out: Path, *, steps: int, whole_steps: int, batch: int = 16, seed: int = 0) -> AutoencoderKL:
    """Trains the mini VAE, `steps` on crops and `whole_steps` on whole pictures, and saves it under `out/vae`, its
    scaling factor measured from its own latents."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pools = [_pictures(1000, resolution, rng)[1] for resolution in MINI_FAMILY.resolutions]
    vae = AutoencoderKL(**MINI_FAMILY.vae)
    with torch.no_grad():  # begin with a narrow posterior: at its default width the noise drowns the means for long
        vae.quant_conv.weight[4:].zero_()
        vae.quant_conv.bias[4:].fill_(-5.0)

    def crops(step: int) -> torch.Tensor:
        small = step < 0.75 * steps
        return _crops(pools[0], 2 * batch if small else batch, 32 if small else 64, rng)

    _train_vae(vae, crops, out, steps=steps, learning_rate=8e-4, title="vae, crops")
    _train_vae(
        vae, lambda _: _whole(pools, batch // 2, rng), out, steps=whole_steps, learning_rate=5e-4, title="vae, whole"
    )
    with torch.no_grad():
        latents = torch.cat(
            [
                vae.encode(_to_tensor(pools[0][i : i + 64])).latent_dist.mode()
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
        images = _pictures(400, resolution, rng)[1]
        with torch.no_grad():
            pools.append(
                (
                    images,
                    torch.cat(
                        [
                            vae.encode(_to_tensor(images[i : i + 32])).latent_dist.mode()
                            for i in range(0, len(images), 32)
                        ]
                    ),
                )
            )
    decoder = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    optimizer = torch.optim.AdamW(decoder, lr=5e-4, betas=(0.9, 0.99), weight_decay=1e-4)
    ema = EMAModel(vae.parameters(), decay=0.99)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-4 * _cosine(step, steps, 50)
        images, latents = pools[rng.integers(len(pools))]
        chosen = rng.integers(0, len(images), batch)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(latents[chosen] + 0.05 * torch.randn_like(latents[chosen])).sample.float()
        loss = _reconstruction_loss(decoded, _to_tensor(images[chosen]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder, 3.0)
        optimizer.step()
        ema.step(vae.parameters())
        if (step + 1) % 100 == 0:
            say(f"decoder {step + 1}/{steps} loss {loss.item():.4f}")
    ema.copy_to(vae.parameters())
    vae.save_pretrained(out / "vae")
    say(f"decoder: reads {_reads(vae, np.random.default_rng(2))}")


def _latent_pool(
    vae: AutoencoderKL, per_resolution: int, seed: int
) -> list[tuple[Resolution, list[str], torch.Tensor]]:
    """For each resolution its captions and scaled latents (count, 4, height / 8, width / 8)."""
    rng = np.random.default_rng(seed)
    pool = []
    for resolution in MINI_FAMILY.resolutions:
        scenes, images = _pictures(per_resolution, resolution, rng)
        with torch.inference_mode():
            chunks = [vae.encode(_to_tensor(images[i : i + 16])).latent_dist.mode() for i in range(0, len(images), 16)]
        latents = torch.cat(chunks).clone() * vae.config.scaling_factor
        pool.append((resolution, [scene.caption for scene in scenes], latents))
        say(f"latents of {resolution}: {len(scenes)}")
    return pool


def make_mini_pipeline(vae: AutoencoderKL) -> StableDiffusionXLPipeline:
    """An SDXL pipeline of the mini family with untrained UNet and text encoders around `vae`."""
    family = MINI_FAMILY
    special = {key: family.text_encoder[key] for key in ("bos_token_id", "eos_token_id")}
    length = family.text_encoder["max_position_embeddings"]
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**family.text_encoder)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**family.text_encoder_2)),
        tokenizer=make_clip_tokenizer(WORDS, max_length=length, **special),
        tokenizer_2=make_clip_tokenizer(WORDS, max_length=length, pad_token="!", **special),
        unet=UNet2DConditionModel(**ARCHITECTURES["mini-sdxl"].unet_config),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _encode_text(pipe: StableDiffusionXLPipeline, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Penultimate hidden states of both encoders (batch, 32, 128) and the second's pooled output (batch, 64)."""
    hidden = []
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        output = encoder(ids, output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
    return torch.cat(hidden, -1), output.text_embeds


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


_TAUGHT = ("unet", "text_encoder", "text_encoder_2")
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

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds = 0.0
        self.step = 0

    def load(self, pipe: StableDiffusionXLPipeline, optimizer: torch.optim.Optimizer, ema: EMAModel) -> None:
        if not self.path.exists():
            return
        state = torch.load(self.path, weights_only=True)
        for name, weights in state["weights"].items():
            getattr(pipe, name).load_state_dict(weights)
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        self.seconds, self.step = state["seconds"], state["step"]
        say(f"unet: going on at step {self.step}, {self.seconds:.0f} s")

    def save(self, pipe: StableDiffusionXLPipeline, optimizer: torch.optim.Optimizer, ema: EMAModel) -> None:
        state = {
            "weights": {name: getattr(pipe, name).state_dict() for name in _TAUGHT},
            "optimizer": optimizer.state_dict(),
            "ema": ema.state_dict(),
            "seconds": self.seconds,
            "step": self.step,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)


def teach_unet(
    pipe: StableDiffusionXLPipeline,
    out: Path,
    *,
    minutes: float,
    learning_rate: float = 8e-4,
    batch: int = 32,
    per_resolution: int = 1200,
    seed: int = 0,
) -> None:
    """Trains the UNet and both text encoders of `pipe` on the task loss for `minutes`.

    The learning rate falls with the time used, so the schedule is whole however fast the machine is. Killed, it goes
    on from `out/teach.state`, which is written as it goes.
    """
    torch.manual_seed(seed)
    pool = _latent_pool(pipe.vae.eval(), per_resolution, seed)
    unet = pipe.unet.train()
    parameters = [parameter for name in _TAUGHT for parameter in getattr(pipe, name).parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    ema = EMAModel(parameters, decay=0.999, foreach=True)
    state = _Progress(out / "teach.state")
    state.load(pipe, optimizer, ema)
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
        hidden, pooled = _encode_text(pipe, captions)
        kept = (torch.rand(batch) >= 0.1).float()
        timesteps = torch.randint(0, 1000, (batch,))
        signal = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise = torch.randn_like(latents)
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        size = (resolution.height, resolution.width)
        added = {
            "text_embeds": pooled * kept[:, None],
            "time_ids": torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32).expand(batch, 6),
        }
        noise_pred = unet(noisy, timesteps, hidden * kept[:, None, None], added_cond_kwargs=added).sample
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
            state.save(pipe, optimizer, ema)
    ema.copy_to(parameters)
    unet.eval()
    pipe.save_pretrained(out, safe_serialization=True)
    state.path.unlink(missing_ok=True)


@torch.no_grad()
def judge(
    pipe: StableDiffusionXLPipeline,
    *,
    count: int = 90,
    steps: int = 25,
    guidance_scale: float = 5.0,
    seed: int = 10_000,
) -> dict[str, float]:
    """How often pictures of unseen captions show what they say: shares per attribute over the nine resolutions."""
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = []
    pictures: list[np.ndarray] = []
    for index, resolution in enumerate(MINI_FAMILY.resolutions):
        some = [random_scene(rng) for _ in range(count // len(MINI_FAMILY.resolutions))]
        images = pipe(
            [scene.caption for scene in some],
            width=resolution.width,
            height=resolution.height,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed + index),
            output_type="np",
        ).images
        scenes += some
        pictures += [np.rint(image * 255).astype(np.uint8) for image in images]
    return share_followed(scenes, pictures)


def teach_mini(
    out: Path,
    *,
    start: Path | None,
    vae_steps: int,
    vae_whole_steps: int,
    minutes: float,
    learning_rate: float,
    decoder_steps: int,
    seed: int,
) -> dict[str, float]:
    """The whole making of the mini teacher, stored in fp16, or the further teaching of the one at `start`; a VAE
    already under `out` is kept. Returns what `judge` says of it."""
    torch.set_flush_denormal(True)
    out.mkdir(parents=True, exist_ok=True)
    if start is not None:
        pipe = StableDiffusionXLPipeline.from_pretrained(start, torch_dtype=torch.float32)
    elif (out / "vae" / "config.json").exists():
        pipe = make_mini_pipeline(AutoencoderKL.from_pretrained(out / "vae"))
    else:
        pipe = make_mini_pipeline(teach_vae(out, steps=vae_steps, whole_steps=vae_whole_steps, seed=seed))
    pipe.set_progress_bar_config(disable=True)
    teach_unet(pipe, out, minutes=minutes, learning_rate=learning_rate, seed=seed)
    if decoder_steps:
        polish_decoder(pipe.vae, out, steps=decoder_steps, seed=seed)
    pipe.to(torch.float16).save_pretrained(out, safe_serialization=True)
    return judge(pipe.to(torch.float32))
