"""The catalogue: which models there are, each a family at a depth.

A student is always built from its config, never by deleting modules, so config.json cannot disagree with the weights.
Published: arXiv 2401.02677 and the models' own config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill.common.errors import unknown
from distill.models.depth import Depth
from distill.models.families import MINI_FAMILY, MINI_SD_FAMILY, SD_1_FAMILY, SDXL_FAMILY, Family


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family at a depth. `parameters` is the UNet's (total, down, mid, up) as published; None for a custom depth."""

    name: str
    family: Family
    depth: Depth
    parameters: tuple[int, int, int, int] | None = None

    @property
    def unet_config(self) -> dict[str, Any]:
        """Keyword arguments of diffusers' UNet2DConditionModel."""
        return self.depth.applied(self.family.unet)

    @property
    def configs(self) -> dict[str, Mapping[str, Any]]:
        """The config of each network, under the name of its folder in a checkpoint."""
        return {**self.family.networks, "unet": self.unet_config}


SDXL_DEPTH = Depth.parse("-/2,2/10,10:10:10,10,10/2,2,2/-")
SSD_1B_DEPTH = Depth.parse("-/2,2/4,4:0:4,4,10/2,1,1/-")
VEGA_DEPTH = Depth.parse("-/1,1/2,2:0:2,2,2/1,1,1/-")
SD_1_DEPTH = Depth.parse("1,1/1,1/1,1/-:1:-/1,1,1/1,1,1/1,1,1")

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            name="sdxl",
            family=SDXL_FAMILY,
            depth=SDXL_DEPTH,
            parameters=(2_567_463_684, 822_941_760, 413_117_440, 1_324_084_480),
        ),
        Architecture(
            name="ssd-1b",
            family=SDXL_FAMILY,
            depth=SSD_1B_DEPTH,
            parameters=(1_331_334_404, 405_871_680, 31_138_560, 887_004_160),
        ),
        Architecture(
            name="vega",
            family=SDXL_FAMILY,
            depth=VEGA_DEPTH,
            parameters=(745_225_604, 246_838_080, 31_138_560, 459_928_960),
        ),
        Architecture(name="mini-sdxl", family=MINI_FAMILY, depth=SDXL_DEPTH),
        Architecture(name="mini-ssd-1b", family=MINI_FAMILY, depth=SSD_1B_DEPTH),
        Architecture(name="mini-vega", family=MINI_FAMILY, depth=VEGA_DEPTH),
        Architecture(
            name="sd-1.5",
            family=SD_1_FAMILY,
            depth=SD_1_DEPTH,
            parameters=(859_520_964, 249_612_480, 97_038_080, 510_795_840),
        ),
        Architecture(name="mini-sd-1.5", family=MINI_SD_FAMILY, depth=SD_1_DEPTH),
    )
}


def architecture_at(family: Family, depth: Depth) -> Architecture:
    """The catalogue's architecture of a family at a depth; a custom one where it has none."""
    known = (a for a in ARCHITECTURES.values() if a.family is family and a.depth == depth)
    return next(known, None) or Architecture(name=str(depth), family=family, depth=depth)


def find_architecture(name: str, family: Family = SDXL_FAMILY) -> Architecture:
    """The architecture called `name`, or, where `name` is a depth pattern, a custom one of `family`.

    Raises UserError for a name that is neither.
    """
    if ":" in name:
        return Architecture(name=name, family=family, depth=Depth.parse(name))
    if name not in ARCHITECTURES:
        raise unknown("architecture", name, ARCHITECTURES)
    return ARCHITECTURES[name]
