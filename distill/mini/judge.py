"""How well a mini model follows its captions, read exactly from its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.checkpoints.folder import find_family
from distill.checkpoints.load import load_pipeline
from distill.checkpoints.sampling import Sampling, sampling_of
from distill.common.errors import UserError, require_between
from distill.data.shapes import Scene, follows, random_scene, shares
from distill.models.resolution import Resolution

GUIDANCE_SCALE = 5.0
READER = 2
"""Counts the ways in which `read_scene` has read: shares read in different ways do not compare."""


def share_followed(scenes: list[Scene], images: Sequence[np.ndarray] | np.ndarray) -> dict[str, float]:
    """For each attribute, and for `all` together, the share of pictures that show what their scene says."""
    return shares([follows(scene, image) for scene, image in zip(scenes, images, strict=True)])


MOST_PICTURES = 900_000
"""Their captions are listed before the first is drawn."""


def check_pictures(count: int, steps: int, resolutions: Sequence[Resolution]) -> None:
    """Raises UserError for a number of pictures that cannot be shared out evenly over the resolutions."""
    sizes = len(resolutions)
    if count < sizes or count % sizes:
        raise UserError(f"{count} pictures are not as many of each of the {sizes} sizes: give a multiple of {sizes}")
    if count > MOST_PICTURES:
        raise UserError(f"{count} pictures; the most is {MOST_PICTURES}")
    require_between(1, 1000, steps=steps)


def judge(
    pipe: Any,
    resolutions: Sequence[Resolution],
    *,
    count: int = 90,
    steps: int = 25,
    guidance_scale: float = GUIDANCE_SCALE,
    seed: int = 10_000,
) -> dict[str, float]:
    """How often pictures of unseen captions show what they say: shares per attribute over `resolutions`.

    Raises UserError for a `count` that is no multiple of their number, and for no step.
    """
    return share_followed(*draw_scenes(pipe, resolutions, count, steps, guidance_scale, seed))


@torch.no_grad()
def draw_scenes(
    pipe: Any, resolutions: Sequence[Resolution], count: int, steps: int, guidance_scale: float, seed: int
) -> tuple[list[Scene], list[np.ndarray]]:
    """Unseen scenes, and a picture of each from its caption: uint8 (height, width, 3). Raises UserError as `judge`."""
    check_pictures(count, steps, resolutions)
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = []
    pictures: list[np.ndarray] = []
    for index, resolution in enumerate(resolutions):
        some = [random_scene(rng) for _ in range(count // len(resolutions))]
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
    return scenes, pictures


def judge_checkpoint(folder: Path, *, count: int, steps: int | None = None) -> dict[str, float]:
    """`judge` of a mini checkpoint at its family's sizes, in its own steps under its own guidance where it knows them and is
    not told otherwise, else in 25 under 5. Raises UserError for more steps than it has."""
    sampling = sampling_of(folder) or Sampling()
    called = {"num_inference_steps": 25, "guidance_scale": GUIDANCE_SCALE} | sampling.call_arguments
    steps = called["num_inference_steps"] if steps is None else steps
    sampling.check(steps)
    pipe = load_pipeline(folder, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    sizes = find_family(folder).resolutions
    return judge(pipe, sizes, count=count, steps=steps, guidance_scale=called["guidance_scale"])
