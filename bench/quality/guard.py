"""The guard: a fast wrong picture is no result. Same seed against the fp32 reference, NaN, black and flat pictures;
for the mini family also, exactly, whether a picture shows what its caption says."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass, field

import numpy as np

from bench.contestants.pictures import Pictures
from export.checks.parity import psnr_db

MIN_PSNR_DB = 20.0  # half precision over thirty steps wanders this far and still draws the same picture
MIN_LATENT_COSINE = 0.95


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Cosine of the angle between two arrays taken as vectors; 0 where either is zero or not finite."""
    a, b = one.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norm) if np.isfinite(norm) and norm > 0 else 0.0


@dataclass
class Quality:
    """`passed` is None where there was nothing to compare with; `words` say what failed, or why nothing was checked.
    `psnr_db` None with `identical` true means that not one pixel differs."""

    passed: bool | None
    words: list[str] = field(default_factory=list)
    psnr_db: float | None = None
    latent_cosine: float | None = None
    identical: bool = False


def guard(pictures: Pictures, reference: Pictures | None, why_not: str = "no fp32 reference was given") -> Quality:
    """Compares with the fp32 reference of the same prompts and seed."""
    words = pictures.faults()
    if reference is None:
        return Quality(False if words else None, words or [why_not])
    if reference.images.shape != pictures.images.shape:
        words.append(f"pictures of shape {pictures.images.shape}, the reference has {reference.images.shape}")
        return Quality(False, words)
    psnr = psnr_db(pictures.images, reference.images)
    similarity, ours, theirs = None, pictures.latents_array(), reference.latents_array()
    if ours is not None and theirs is not None:
        similarity = cosine(ours, theirs)
        if similarity < MIN_LATENT_COSINE:
            words.append(f"latents at cosine {similarity:.3f} to the reference (at least {MIN_LATENT_COSINE})")
    if psnr < MIN_PSNR_DB:
        words.append(f"PSNR {psnr:.1f} dB to the reference (at least {MIN_PSNR_DB:.0f} dB)")
    identical = math.isinf(psnr)
    return Quality(not words, words, None if identical else psnr, similarity, identical)


def follows_caption(caption: str, image: np.ndarray) -> dict[str, bool] | None:
    """Per attribute of the shapes world whether the picture shows it; None for a caption that is not of that world."""
    from distill.data.shapes import Scene, follows

    try:
        scene = Scene.parse(caption)
    except ValueError:
        return None
    return follows(scene, image)


def png_base64(image: np.ndarray) -> str:
    """The uint8 picture (height, width, 3) as a base64 PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
