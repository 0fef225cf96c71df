"""How well a mini model follows its captions, read exactly from its pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline

from distill.common.errors import UserError, require_between
from distill.data.shapes import Scene, follows, random_scene, shares
from distill.models.families import MINI_FAMILY

READER = 2
"""Counts the ways in which `read_scene` has read: shares read in different ways do not compare."""


def share_followed(scenes: list[Scene], images: Sequence[np.ndarray] | np.ndarray) -> dict[str, float]:
    """For each attribute, and for `all` together, the share of pictures that show what their scene says."""
    return shares([follows(scene, image) for scene, image in zip(scenes, images, strict=True)])


MOST_PICTURES = 900_000
"""Their captions are listed before the first is drawn."""


def check_pictures(count: int, steps: int) -> None:
    """Raises UserError for what `judge` cannot share out evenly."""
    sizes = len(MINI_FAMILY.resolutions)
    if count < sizes or count % sizes:
        raise UserError(f"{count} pictures are not as many of each of the {sizes} sizes: give a multiple of {sizes}")
    if count > MOST_PICTURES:
        raise UserError(f"{count} pictures; the most is {MOST_PICTURES}")
    require_between(1, 1000, steps=steps)


@torch.no_grad()
def judge(
    pipe: StableDiffusionXLPipeline,
    *,
    count: int = 90,
    steps: int = 25,
    guidance_scale: float = 5.0,
    seed: int = 10_000,
) -> dict[str, float]:
    """How often pictures of unseen captions show what they say: shares per attribute over the nine resolutions.

    Raises UserError for a `count` that is no multiple of nine, and for no step.
    """
    check_pictures(count, steps)
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
