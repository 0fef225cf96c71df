"""Prompts to draw where no user is: lines of a file, our own where none is named, captions of shapes for a mini model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distill.checkpoints.folder import find_family, read_config
from distill.checkpoints.load import load_pipeline
from distill.common.errors import UserError
from distill.models.conditioning import conditioning_of

if TYPE_CHECKING:
    from torch import Tensor

OURS = Path(__file__).with_name("prompts.txt")
LEAST = 4
"""With fewer, chance decides the ranges."""


def read_prompts(file: Path | None, checkpoint: Path, count: int | None = None) -> list[str]:
    """The first `count` prompts, or all. `file` None means ours, for a mini family 64 captions of its own world.

    Raises UserError where there are fewer than asked for, or fewer than `LEAST`, and for a refiner.
    """
    family = find_family(checkpoint)
    family.conditioning.require_drawing_from_text(checkpoint)
    if file is None and family.vocabulary is not None:
        from distill.data.shapes import random_scene

        rng = np.random.default_rng(0)
        prompts = [random_scene(rng).caption for _ in range(64)]
    else:
        prompts = _lines(file or OURS)
    wanted = len(prompts) if count is None else count
    if min(wanted, len(prompts)) < LEAST or wanted > len(prompts):
        raise UserError(
            f"{wanted} prompt(s) are wanted of {len(prompts)} in {file or 'the list of our own'}: the least is {LEAST}, 32 "
            "to 128 are usual, the most what is there; give a file with one a line (--prompts), or another --count"
        )
    return prompts[:wanted]


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise UserError(f"--prompts {file} is no file; it takes one with a prompt a line")
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"--prompts {file} is no text in UTF-8") from None


def encode_prompts(checkpoint: Path, prompts: Sequence[str]) -> dict[str, Tensor]:
    """What a checkpoint's UNet reads of prompts, in fp32: see `Conditioning.encode`."""
    import torch

    pipe = load_pipeline(checkpoint, torch.float32, without=("unet", "vae"))
    with torch.no_grad():
        return conditioning_of(read_config(checkpoint, "unet"), checkpoint).encode(pipe, prompts)


def some_text(checkpoint: Path) -> dict[str, Tensor]:
    """The same of a few prompts: what a UNet in 8 bits is compared on, since its ranges hold for real text alone."""
    return encode_prompts(checkpoint, read_prompts(None, checkpoint, LEAST))
