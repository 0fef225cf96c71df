"""How large the inputs of each layer become: what calibration finds, as a JSON file.

A file belongs to one UNet, by the hash of its weights, and says what was drawn to find it, so it can be made on any
machine and is never used for other weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.common.errors import UserError
from distill.common.files import read_object, sha256_json, write_json

SCHEMA = 1
PERCENTILES = (99.0, 99.9, 99.99, 99.999, 100.0)
"""Those of |x| that are kept; 100 is the absolute maximum."""


@dataclass(frozen=True)
class Range:
    """Of one layer's input: `channels` the absolute maximum of each input channel, `percentiles` of all |x| (in the order
    of `PERCENTILES`; of a linear layer only the last counts, the rest is equal to it)."""

    channels: list[float]
    percentiles: list[float]

    def at(self, percentile: float) -> float:
        return self.percentiles[PERCENTILES.index(percentile)]


@dataclass(frozen=True)
class Ranges:
    """`unet_sha256` as `unet_hash` gives it; `drawn` says what was drawn: prompts, steps, sizes, guidance, seed."""

    unet_sha256: str
    drawn: dict[str, Any]
    layers: dict[str, Range]

    @property
    def sha256(self) -> str:
        return sha256_json(asdict(self))


def unet_hash(source_sha256: Mapping[str, str]) -> str:
    """One hash of a UNet's weights, of the `source_sha256` of its export.json: whatever its files are called."""
    return sha256_json(list(source_sha256.values()))


def write_ranges(path: Path, ranges: Ranges) -> None:
    write_json(path, {"schema": SCHEMA, **asdict(ranges)})


def read_ranges(path: Path) -> Ranges:
    """Raises UserError for a file that is none of ours, or damaged: a range that is negative, NaN or infinite."""
    if not path.is_file():
        raise UserError(f"there are no ranges in {path}; leave --ranges out to calibrate")
    again = "calibrate again (remove it, or leave --ranges out)"
    content = read_object(path)
    if content.get("schema") != SCHEMA or not isinstance(content.get("layers"), dict):
        raise UserError(f"{path} is no file of ranges of this slimxl; {again}")
    try:
        layers = {
            name: Range(*([float(value) for value in entry[kind]] for kind in ("channels", "percentiles")))
            for name, entry in content["layers"].items()
        }
        ranges = Ranges(str(content["unet_sha256"]), dict(content["drawn"]), layers)
        for name, one in layers.items():
            if not all(math.isfinite(value) and value >= 0 for value in (*one.channels, *one.percentiles)):
                raise UserError(f"{path}: the range of {name} has a number that is none, or below 0; {again}")
            if len(one.percentiles) != len(PERCENTILES) or not one.channels or not _agree(one):
                raise UserError(f"{path}: the channels and percentiles of {name} contradict each other; {again}")
    except (TypeError, ValueError, KeyError):
        raise UserError(f"{path} is damaged; {again}") from None
    return ranges


def _agree(one: Range) -> bool:
    """Whether percentiles rise to the largest channel, which the file holds in six digits."""
    return sorted(one.percentiles) == one.percentiles and math.isclose(
        max(one.channels), one.percentiles[-1], rel_tol=1e-4
    )


def require_fit(ranges: Ranges, unet_sha256: str, layers: Iterable[str], where: str) -> None:
    """Raises UserError where the ranges are of other weights, or lack a layer."""
    if ranges.unet_sha256 != unet_sha256:
        raise UserError(
            f"{where}: the ranges are of another UNet ({ranges.unet_sha256[:12]}, the graph's is {unet_sha256[:12]}): of "
            "another checkpoint, or without its LoRAs; leave --ranges out to calibrate again"
        )
    if missing := [name for name in layers if name not in ranges.layers]:
        raise UserError(f"{where}: the ranges lack {missing[0]}; leave --ranges out to calibrate again")


BINS_AN_OCTAVE, LOWEST, HIGHEST = 32, -24, 16
BINS = BINS_AN_OCTAVE * (HIGHEST - LOWEST)
"""Of a histogram of log2 |x|: equal bins for every layer and call, so that counts add up."""


def percentiles_of(counts: np.ndarray, largest: float) -> list[float]:
    """The upper edge of the bin that each of `PERCENTILES` falls into, at most the `largest` value."""
    if not counts.sum():
        return [largest] * len(PERCENTILES)
    reached = np.cumsum(counts) / counts.sum()
    places = np.searchsorted(reached, np.array(PERCENTILES) / 100 - 1e-12)
    edges = 2.0 ** (LOWEST + (places + 1) / BINS_AN_OCTAVE)
    return [min(float(edge), largest) for edge in edges[:-1]] + [largest]
