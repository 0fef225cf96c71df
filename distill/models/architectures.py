"""The catalogue: which models there are, each a family at a depth.

A student is always built from its config, never by deleting modules, so config.json cannot disagree with the weights.
Published: arXiv 2401.02677 (SSD-1B, Vega), 2312.04005 (KOALA), 2305.15798 (BK-SDM) and the models' own config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill.common.errors import unknown
from distill.models.depth import Depth
from distill.models.families import (
    MINI_FAMILY,
    MINI_REFINER_FAMILY,
    MINI_SD_FAMILY,
    SD_1_FAMILY,
    SD_2_768_FAMILY,
    SD_2_FAMILY,
    SDXL_FAMILY,
    SDXL_REFINER_FAMILY,
    Family,
)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family at a depth. `title` is the name as its makers write it, `parameters` is the UNet's (total, down, mid,
    up) as published; empty and None for a custom depth."""

    name: str
    title: str = ""
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
KOALA_1B_DEPTH = Depth.parse("-/2/6:6:6,6/2,2/-")
KOALA_700M_DEPTH = Depth.parse("-/2/5:-:5,5/2,2/-")
REFINER_DEPTH = Depth.parse("-/4,4/4,4/-:4:-/4,4,4/4,4,4/-")
SD_DEPTH = Depth.parse("1,1/1,1/1,1/-:1:-/1,1,1/1,1,1/1,1,1")
BK_BASE_DEPTH = Depth.parse("1/1/1/-:1:-/1,1/1,1/1,1")
BK_SMALL_DEPTH = Depth.parse("1/1/1/-:-:-/1,1/1,1/1,1")
BK_TINY_DEPTH = Depth.parse("1/1/1:-:1,1/1,1/1,1")
"""BK-SDM's three (arXiv 2305.15798); Segmind's Small-SD has the first."""

_TABLE: tuple[tuple[str, str, Family, Depth, tuple[int, int, int, int] | None], ...] = (
    ("sdxl", "SDXL", SDXL_FAMILY, SDXL_DEPTH, (2_567_463_684, 822_941_760, 413_117_440, 1_324_084_480)),
    ("ssd-1b", "SSD-1B", SDXL_FAMILY, SSD_1B_DEPTH, (1_331_334_404, 405_871_680, 31_138_560, 887_004_160)),
    ("vega", "Vega", SDXL_FAMILY, VEGA_DEPTH, (745_225_604, 246_838_080, 31_138_560, 459_928_960)),
    ("koala-1b", "KOALA-1B", SDXL_FAMILY, KOALA_1B_DEPTH, (1_161_184_324, 270_656_000, 274_094_080, 609_114_240)),
    ("koala-700m", "KOALA-700M", SDXL_FAMILY, KOALA_700M_DEPTH, (782_822_724, 235_900_160, 0, 539_602_560)),
    ("sdxl-refiner", "SDXL refiner", SDXL_REFINER_FAMILY, REFINER_DEPTH, None),
    ("sd-1.5", "SD 1.5", SD_1_FAMILY, SD_DEPTH, (859_520_964, 249_612_480, 97_038_080, 510_795_840)),
    ("small-sd", "Small-SD", SD_1_FAMILY, BK_BASE_DEPTH, (579_384_964, 130_388_160, 97_038_080, 349_884_160)),
    ("bk-sdm-small", "BK-SDM-Small", SD_1_FAMILY, BK_SMALL_DEPTH, (482_346_884, 130_388_160, 0, 349_884_160)),
    ("tiny-sd", "Tiny-SD", SD_1_FAMILY, BK_TINY_DEPTH, (323_384_964, 84_502_720, 0, 236_807_680)),
    ("sd-2.1-base", "SD 2.1 base", SD_2_FAMILY, SD_DEPTH, (865_910_724, 251_906_240, 97_693_440, 514_236_480)),
    ("sd-2.1", "SD 2.1", SD_2_768_FAMILY, SD_DEPTH, (865_910_724, 251_906_240, 97_693_440, 514_236_480)),
    (
        "bk-sdm-v2-base",
        "BK-SDM-v2-Base",
        SD_2_FAMILY,
        BK_BASE_DEPTH,
        (583_480_964, 131_535_040, 97_693_440, 352_177_920),
    ),
    ("bk-sdm-v2-small", "BK-SDM-v2-Small", SD_2_FAMILY, BK_SMALL_DEPTH, (485_787_524, 131_535_040, 0, 352_177_920)),
    ("bk-sdm-v2-tiny", "BK-SDM-v2-Tiny", SD_2_FAMILY, BK_TINY_DEPTH, (326_825_604, 85_649_600, 0, 239_101_440)),
    ("mini-sdxl", "mini SDXL", MINI_FAMILY, SDXL_DEPTH, None),
    ("mini-ssd-1b", "mini SSD-1B", MINI_FAMILY, SSD_1B_DEPTH, None),
    ("mini-vega", "mini Vega", MINI_FAMILY, VEGA_DEPTH, None),
    ("mini-koala-1b", "mini KOALA-1B", MINI_FAMILY, KOALA_1B_DEPTH, None),
    ("mini-koala-700m", "mini KOALA-700M", MINI_FAMILY, KOALA_700M_DEPTH, None),
    ("mini-refiner", "mini SDXL refiner", MINI_REFINER_FAMILY, REFINER_DEPTH, None),
    ("mini-sd-1.5", "mini SD 1.5", MINI_SD_FAMILY, SD_DEPTH, None),
    ("mini-small-sd", "mini Small-SD", MINI_SD_FAMILY, BK_BASE_DEPTH, None),
    ("mini-tiny-sd", "mini Tiny-SD", MINI_SD_FAMILY, BK_TINY_DEPTH, None),
)
ARCHITECTURES = {
    name: Architecture(name=name, title=title, family=family, depth=depth, parameters=parameters)
    for name, title, family, depth, parameters in _TABLE
}
ALIASES = {"bk-sdm-base": "small-sd", "bk-sdm-tiny": "tiny-sd"}
"""Two names of one UNet."""
CLAIMED_SPEEDUPS = {"ssd-1b": 1.6, "vega": 2.0}
"""How many times as fast as their family's whole model their makers say they are: "up to 60 %" and "100 %" faster (arXiv
2401.02677)."""


def architecture_at(family: Family, depth: Depth) -> Architecture:
    """The catalogue's architecture of a family at a depth; a custom one where it has none."""
    known = (a for a in ARCHITECTURES.values() if a.family is family and a.depth == depth)
    return next(known, None) or Architecture(name=str(depth), family=family, depth=depth)


def whole(family: Family) -> Architecture:
    """A family at its full depth: its teacher, which the catalogue names first."""
    return next(architecture for architecture in ARCHITECTURES.values() if architecture.family is family)


def find_architecture(name: str, family: Family = SDXL_FAMILY) -> Architecture:
    """The architecture called `name`, or, where `name` is a depth pattern, a custom one of `family`.

    Raises UserError for a name that is neither.
    """
    if ":" in name:
        return Architecture(name=name, family=family, depth=Depth.parse(name))
    name = ALIASES.get(name, name)
    if name not in ARCHITECTURES:
        raise unknown("architecture", name, [*ARCHITECTURES, *ALIASES])
    return ARCHITECTURES[name]
