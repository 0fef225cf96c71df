"""Captioned pictures in a folder, for tests of data and of the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def save_picture(folder: Path, name: str, size: tuple[int, int], caption: str | None) -> None:
    """NAME.png of noise, `size` (width, height), and NAME.txt beside it."""
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    if caption is not None:
        (folder / f"{name}.txt").write_text(caption)
