"""Pictures of a pipeline, and how near two are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).resize((128, 128))
MASK = Image.fromarray(np.pad(np.full((64, 64), 255, np.uint8), 32))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, **arguments: Any) -> np.ndarray:
    settings = {"num_inference_steps": 3, "width": 128, "height": 128, "prompt": "a red circle"} | arguments
    given = {name: value for name, value in settings.items() if value is not None or name == "prompt"}
    return np.stack(pipeline(generator=torch.Generator().manual_seed(7), output_type="np", **given).images)


def psnr_db(image: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of pictures in [0, 1]."""
    assert image.shape == other.shape and np.isfinite(image).all() and image.std() > 0.001
    return float(-10 * np.log10(max(np.mean((image - other) ** 2), 1e-12)))
