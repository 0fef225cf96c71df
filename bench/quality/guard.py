"""The guard: a fast wrong picture is no result. Same seed against the fp32 reference, the noise_pred of every step, NaN,
black and flat pictures; for the mini family also, exactly, whether a picture shows what its caption says.

Pictures alone are not enough: with random weights a UNet moves the latents so little that a wrong one draws the right
picture. noise_pred is what the UNet itself says.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.contestants.pictures import Pictures
from export.checks.parity import psnr_db

MIN_PSNR_DB = 20.0  # half precision over thirty steps wanders this far and still draws the same picture
MIN_LATENT_COSINE = 0.95
MAX_NOISE_ERROR = (0.08, 0.5)
"""Of the first step, whose latents are the reference's, and of any, where the drift of all before adds: the prompt left out
makes 0.1 to 0.5, bf16 0.05 and fp16 0.006 of the first step (mini models, taught and random, guided and not)."""
MAX_NOISE_ERROR_8_BITS = (0.2, 0.7)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Cosine of the angle between two arrays taken as vectors; 0 where either is zero or not finite."""
    a, b = one.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norm) if np.isfinite(norm) and norm > 0 else 0.0


def noise_errors(noise_preds: np.ndarray, reference: np.ndarray) -> list[float]:
    """|noise_pred - reference| / |reference| (2-norms) of each step, of (steps, ...); infinite where that is no number."""
    flat, expected = (array.astype(np.float64).reshape(len(array), -1) for array in (noise_preds, reference))
    with np.errstate(all="ignore"):
        errors = np.linalg.norm(flat - expected, axis=1) / np.linalg.norm(expected, axis=1)
    return [float(error) if np.isfinite(error) else math.inf for error in errors]


@dataclass
class Quality:
    """`passed` is None where there was nothing to compare with, or where the guard does not find a wrong UNet of this model
    either; `words` say what failed, or why nothing was checked. `psnr_db` None with `identical` true means that not one
    pixel differs. `noise_errors` are relative, step by step; an infinite one is told as `words` and None."""

    passed: bool | None
    words: list[str] = field(default_factory=list)
    psnr_db: float | None = None
    latent_cosine: float | None = None
    identical: bool = False
    noise_errors: list[float | None] | None = None
    control: dict[str, Any] | None = None


def guard(
    pictures: Pictures,
    reference: Pictures | None,
    why_not: str = "no fp32 reference was given",
    *,
    eight_bits: bool = False,
) -> Quality:
    """Compares with the fp32 reference of the same prompts and seed; a UNet in 8 bits may be further off."""
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
    errors = None
    if pictures.noise_preds is not None and reference.noise_preds is not None:
        errors, more = _judge_noise(pictures.noise_preds, reference.noise_preds, eight_bits)
        words += more
    identical = math.isinf(psnr)
    return Quality(not words, words, None if identical else psnr, similarity, identical, errors)


def _judge_noise(
    noise_preds: np.ndarray, reference: np.ndarray, eight_bits: bool
) -> tuple[list[float | None] | None, list[str]]:
    """(the error of each step, what is wrong)"""
    if noise_preds.shape != reference.shape:
        return None, [f"noise_pred of shape {noise_preds.shape}, the reference has {reference.shape}"]
    errors = noise_errors(noise_preds, reference)
    first, later = MAX_NOISE_ERROR_8_BITS if eight_bits else MAX_NOISE_ERROR
    worst = max(range(len(errors)), key=lambda step: errors[step] / (later if step else first))
    most, words = later if worst else first, []
    if errors[worst] > most:
        words = [f"noise_pred of step {worst + 1} is off by {errors[worst]:.0%} of its size (at most {most:.0%})"]
    return [None if math.isinf(error) else error for error in errors], words


def with_control(quality: Quality, control: Quality, what: str) -> Quality:
    """`quality` beside the guard's verdict on a deliberately wrong UNet of the same model, `what` is wrong with it. Where
    that passes, a pass says nothing."""
    caught = control.passed is False
    worst = max((error for error in control.noise_errors or [] if error is not None), default=None)
    quality.control = {"what": what, "caught": caught, "noise_error": worst}
    if not caught and quality.passed:
        quality.passed = None
        quality.words.append(f"nothing was shown: the guard passes a UNet too {what}")
    return quality


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
