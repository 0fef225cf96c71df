"""Captioned pictures in folders and in tar files, for tests of data and of the cache."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image


def save_picture(folder: Path, name: str, size: tuple[int, int], caption: str | None, kind: str = "png") -> None:
    """NAME.kind of noise, `size` (width, height), and NAME.txt beside it."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path = folder / f"{name}.{kind}"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def png(color: str = "red") -> bytes:
    data = BytesIO()
    Image.new("RGB", (160, 160), color).save(data, "PNG")
    return data.getvalue()


def save_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> None:
    """The files in their order, repeated names too, which WebDataset's own writer would refuse."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
