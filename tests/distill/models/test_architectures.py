from __future__ import annotations

import pytest

from distill.common.errors import UserError
from distill.models.architectures import ARCHITECTURES, SSD_1B_DEPTH, Architecture, find_architecture
from distill.models.catalogue import catalogue_row, count_parameters, meta_unet
from distill.models.depth import Depth
from distill.models.families import FAMILIES

PUBLISHED = [architecture for architecture in ARCHITECTURES.values() if architecture.parameters]


@pytest.mark.parametrize("architecture", PUBLISHED, ids=lambda a: a.name)
def test_parameter_counts_are_the_published_ones(architecture: Architecture) -> None:
    unet = meta_unet(architecture)
    parts = [count_parameters(part) if part else 0 for part in (unet, unet.down_blocks, unet.mid_block, unet.up_blocks)]
    assert tuple(parts) == architecture.parameters


def test_two_names_of_one_unet() -> None:
    assert find_architecture("bk-sdm-tiny") is find_architecture("tiny-sd")


@pytest.mark.parametrize(("name", "tflop", "blocks"), [("sdxl", 13.52, 70), ("ssd-1b", 8.42, 34), ("vega", 5.65, 15)])
def test_compute_and_depth_agree_with_the_known_figures(name: str, tflop: float, blocks: int) -> None:
    row = catalogue_row(ARCHITECTURES[name])
    assert row.tflop_per_call == pytest.approx(tflop, rel=2e-3)
    assert row.transformer_blocks == blocks


def test_depth_of_sdxls_own_config_json() -> None:
    own = ARCHITECTURES["sdxl"].unet_config | {
        "transformer_layers_per_block": [1, 2, 10],
        "reverse_transformer_layers_per_block": None,
    }
    assert Depth.from_config(own) == ARCHITECTURES["sdxl"].depth


def test_a_depth_of_ones_own_is_an_architecture() -> None:
    assert find_architecture(str(SSD_1B_DEPTH)).depth == SSD_1B_DEPTH


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'veag'.*mini-vega.*ssd-1b.*did you mean 'vega'"):
        find_architecture("veag")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda f: f.name)
def test_its_resolutions_fit_the_unet(family) -> None:
    assert len(set(family.resolutions)) == len(family.resolutions)
    assert all(r.width % family.size_multiple == 0 == r.height % family.size_multiple for r in family.resolutions)
