"""FID and CLIP score of a contestant, where the user gives captions and references: a two-sided band, not a best value.

FID compares Gaussian fits of Inception features [Heusel 2017, eq. 6]; the extractor is a TorchScript file that maps
uint8 pictures (batch, 3, height, width) to features, and the reference is an .npz with `mu` and `sigma`. The CLIP
score is 100 times the mean cosine of picture and caption [Hessel 2021], never below 0. MLPerf's band for SDXL: FID
23.01 to 23.95 and CLIP 31.69 to 31.81 on 5000 COCO-2014 captions, 20 Euler steps, guidance 8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.common.errors import UserError, require_least
from distill.common.progress import track

BATCH = 16
"""Pictures that the scoring networks see at once."""


@dataclass(kw_only=True)
class FidelityOptions:
    """FID and CLIP score are taken where captions are given; without a band a value is told, but judged by nobody."""

    captions: Path | None = None
    """Text file, one caption a line: FID and CLIP score over its first --caption-count lines. Neither if not given."""
    caption_count: int = 200
    """Captions to draw, one picture each, from the first on."""
    fid_reference: Path | None = None
    """.npz with mu and sigma of the reference pictures' features."""
    fid_extractor: Path | None = None
    """TorchScript file, uint8 pictures (batch, 3, height, width) to features."""
    clip_model: str | None = None
    """Folder or hub id of a CLIP model for the CLIP score."""
    fid_band: tuple[float, float] | None = None
    """Low and high: outside of it the quality guard fails. MLPerf's for SDXL: 23.01 23.95."""
    clip_band: tuple[float, float] | None = None
    """Low and high. MLPerf's for SDXL: 31.69 31.81."""


NEEDS = (  # (option, the option without which it has no effect)
    ("fid_reference", "captions"),
    ("fid_extractor", "captions"),
    ("clip_model", "captions"),
    ("fid_reference", "fid_extractor"),
    ("fid_extractor", "fid_reference"),
    ("fid_band", "fid_reference"),
    ("clip_band", "clip_model"),
)


def read_captions(path: Path, count: int, option: str = "--captions") -> list[str]:
    """The first `count` lines that are not empty. Raises UserError where there are none."""
    if not path.is_file():
        found = "is no file" if path.exists() else "does not exist"
        raise UserError(f"{path} {found}; {option} takes a text file, read a line at a time")
    try:
        captions = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error}); {option} takes one, read a line at a time") from None
    if not captions:
        raise UserError(f"{path} holds only empty lines; {option} needs a text file with one or more")
    return captions[:count]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def read_statistics(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(mu (d,), sigma (d, d)) of the reference pictures. Raises UserError for any other file."""
    try:
        with np.load(path) as file:
            mu, sigma = np.asarray(file["mu"], np.float64), np.asarray(file["sigma"], np.float64)
    except Exception as error:  # what a broken file raises is numpy's, zipfile's or pickle's
        raise UserError(
            f"{path} is no .npz of reference statistics with `mu` and `sigma` ({_first_line(error)})"
        ) from None
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise UserError(f"{path}: mu of shape {mu.shape} and sigma of shape {sigma.shape} do not fit")
    return mu, sigma


def frechet_distance(mu: np.ndarray, sigma: np.ndarray, other_mu: np.ndarray, other_sigma: np.ndarray) -> float:
    """|mu - mu'|² + tr(S + S' - 2 (S S')^½), the root by the eigenvalues of the symmetric S^½ S' S^½."""
    values, vectors = np.linalg.eigh(sigma)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ other_sigma @ root), 0, None)).sum()
    return float(((mu - other_mu) ** 2).sum() + np.trace(sigma) + np.trace(other_sigma) - 2 * cross)


def fid(features: np.ndarray, reference: tuple[np.ndarray, np.ndarray]) -> float:
    """FID of features (count, d), at least two, against the reference statistics."""
    check_width(features, reference)
    return frechet_distance(features.mean(0), np.cov(features, rowvar=False), *reference)


def check_width(features: np.ndarray, reference: tuple[np.ndarray, np.ndarray]) -> None:
    """Raises UserError for features (count, d) of another network than the reference's."""
    if features.shape[1] != len(reference[0]):
        raise UserError(
            f"the extractor gives {features.shape[1]} features, the reference has {len(reference[0])}; use the one the "
            "reference was made with"
        )


def clip_scorer(model: str, device: str = "cpu") -> Callable[[list[str], np.ndarray], np.ndarray]:
    """A function of captions and uint8 pictures (batch, height, width, 3) to scores (batch,)."""
    import torch
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    try:
        clip = CLIPModel.from_pretrained(model).eval().to(device)
        tokenizer = CLIPTokenizer.from_pretrained(model)
        processor = CLIPImageProcessor.from_pretrained(model)
    except Exception as error:  # a broken folder raises what its readers do
        raise UserError(f"CLIP model {model!r} cannot be loaded: {_first_line(error)}") from None

    def score(captions: list[str], images: np.ndarray) -> np.ndarray:
        pixels = processor(images=list(images), return_tensors="pt").pixel_values
        tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            output = clip(pixel_values=pixels.to(device), **tokens.to(device))
        cosine = (output.image_embeds * output.text_embeds).sum(-1)  # both already of length one
        return (100 * cosine).clamp(min=0).cpu().numpy()

    return score


def feature_extractor(path: Path, device: str = "cpu") -> Callable[[np.ndarray], np.ndarray]:
    """A function of uint8 pictures (batch, height, width, 3) to features (batch, d). A network that gives features only
    where it is asked for them, as NVIDIA's Inception does by `return_features`, is asked."""
    import torch

    try:
        network = torch.jit.load(str(path), map_location=device).eval()
        asked = {one.name for one in network.forward.schema.arguments} & {"return_features"}
    except Exception as error:
        raise UserError(f"{path} is no TorchScript feature extractor: {_first_line(error)}") from None

    def extract(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            pictures = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
            features = network(pictures, **dict.fromkeys(asked, True))
        return features.reshape(len(images), -1).double().cpu().numpy()

    return extract


def outside_band(name: str, value: float, band: tuple[float, float] | None) -> list[str]:
    """What is wrong with a value, on either side: too good a value is as suspect as a bad one."""
    if band is None or band[0] <= value <= band[1]:
        return []
    return [f"{name} {value:.2f} is {'below' if value < band[0] else 'above'} the band {band[0]:g} to {band[1]:g}"]


def check_references(options: FidelityOptions) -> None:
    """Raises UserError for captions, reference statistics and networks that cannot be used, and for what would judge
    nothing, before anything is drawn."""
    for what, other in NEEDS:
        if getattr(options, what) is not None and getattr(options, other) is None:
            given, needed = (name.replace("_", "-") for name in (what, other))
            raise UserError(f"--{given} judges nothing without --{needed}; give both or neither")
    for name, band in (("fid", options.fid_band), ("clip", options.clip_band)):
        if band is not None and not band[0] <= band[1]:
            raise UserError(f"--{name}-band {band[0]:g} {band[1]:g}: the low end comes first")
    if options.captions is None:
        return
    require_least(1, caption_count=options.caption_count)
    read_captions(options.captions, options.caption_count)
    black = np.zeros((1, 299, 299, 3), np.uint8)
    if options.fid_reference is not None and options.fid_extractor is not None:
        extract, statistics = feature_extractor(options.fid_extractor), read_statistics(options.fid_reference)
        try:
            features = extract(black)
        except Exception as error:  # the user's own network
            told = f"{options.fid_extractor} fails on a uint8 picture {tuple(black.shape)}: {_first_line(error)}"
            raise UserError(told) from None
        check_width(features, statistics)
    if options.clip_model is not None:
        clip_scorer(options.clip_model)(["black"], black)


def measure_fidelity(
    draw: Callable[[str, int], np.ndarray], options: FidelityOptions, device: str = "cpu"
) -> dict[str, Any] | None:
    """Draws a picture a caption (`draw(caption, seed)` gives uint8 (height, width, 3)) and scores them on `device`, BATCH at
    a time.

    Returns None without captions, else {"fid", "clip", "count", "words", "notes"}; a score without its reference is
    None, and `notes` say why.
    Raises UserError for references that cannot be read.
    """
    if options.captions is None:
        return None
    captions = read_captions(options.captions, options.caption_count)
    extract = feature_extractor(options.fid_extractor, device) if options.fid_extractor else None
    reference = read_statistics(options.fid_reference) if options.fid_reference else None
    score = clip_scorer(options.clip_model, device) if options.clip_model else None
    features, scores = [], []
    for first in track(range(0, len(captions), BATCH), "pictures for FID and CLIP", f"{BATCH} captions"):
        part = captions[first : first + BATCH]
        images = np.stack([draw(caption, first + index) for index, caption in enumerate(part)])
        if extract is not None:
            features.append(extract(images))
        if score is not None:
            scores.append(score(part, images))
    result: dict[str, Any] = {"fid": None, "clip": None, "count": len(captions), "words": [], "notes": []}
    if reference is not None and len(captions) > 1:
        stacked = np.concatenate(features)
        result["fid"] = fid(stacked, reference)
        if len(stacked) > stacked.shape[1]:
            result["words"] += outside_band("FID", result["fid"], options.fid_band)
        else:
            few = f"FID of {len(stacked)} pictures in {stacked.shape[1]} dimensions is biased upwards"
            result["notes"].append(f"{few}: no band judges it")
    else:
        result["notes"].append("no FID: it needs --fid-reference, --fid-extractor and two captions")
    if scores:
        result["clip"] = float(np.concatenate(scores).mean())
        result["words"] += outside_band("CLIP score", result["clip"], options.clip_band)
    else:
        result["notes"].append("no CLIP score: it needs --clip-model")
    return result
