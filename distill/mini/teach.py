"""Makes the mini teacher: its VAE, then its UNet and both text encoders together, then its decoder once more.

All of it happens once, on the machine of whoever makes a new teacher; the distillation of students is `trainer.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from distill.checkpoints.sources import load_pipeline, resolve
from distill.common.errors import require_above, require_least
from distill.common.files import write_json
from distill.common.ownership import require_our_folder
from distill.mini.judge import judge
from distill.mini.teach_unet import make_mini_pipeline, teach_unet
from distill.mini.teach_vae import polish_decoder, teach_vae


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
    already under `out` is kept. Returns what `judge` says of it. Raises UserError for a `start` that is no SDXL
    checkpoint, and for a number out of range."""
    require_least(0, vae_steps=vae_steps, vae_whole_steps=vae_whole_steps, minutes=minutes, decoder_steps=decoder_steps)
    require_least(0, seed=seed)
    require_above(0, learning_rate=learning_rate)
    torch.set_flush_denormal(True)
    require_our_folder(out, "a mini teacher", ["teach.json"], ("seed", "vae_steps"))
    began = None if start is None else load_pipeline(resolve(str(start), out), torch.float32)
    write_json(out / "teach.json", {"seed": seed, "vae_steps": vae_steps, "vae_whole_steps": vae_whole_steps})
    if began is not None:
        pipe = began
    elif (out / "vae" / "config.json").exists():
        pipe = make_mini_pipeline(AutoencoderKL.from_pretrained(out / "vae"))
    else:
        pipe = make_mini_pipeline(teach_vae(out, steps=vae_steps, whole_steps=vae_whole_steps, seed=seed))
    pipe.set_progress_bar_config(disable=True)
    if minutes:
        teach_unet(pipe, out, minutes=minutes, learning_rate=learning_rate, seed=seed)
    if decoder_steps:
        polish_decoder(pipe.vae, out, steps=decoder_steps, seed=seed)
    pipe.to(torch.float16).save_pretrained(out, safe_serialization=True)
    return judge(pipe.to(torch.float32))
