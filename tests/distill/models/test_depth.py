from __future__ import annotations

import pytest
from diffusers import UNet2DConditionModel

from distill.common.errors import UserError
from distill.models.architectures import ARCHITECTURES, Architecture
from distill.models.catalogue import count_parameters, meta_unet
from distill.models.depth import Depth
from distill.models.families import MINI_FAMILY, SDXL_FAMILY

KOALA_1B, KOALA_700M = "-/2/6:6:6,6/2,2/-", "-/2/5:-:5,5/2,2/-"


KNOWN = sorted({str(architecture.depth) for architecture in ARCHITECTURES.values()})


@pytest.mark.parametrize("text", [*KNOWN, "1/1/1/-:1:-/1,1/1,1/1,1", "1/1/1:-:1,1/1,1/1,1"])
def test_text_and_config_say_the_same(text: str) -> None:
    depth = Depth.parse(text)
    assert str(depth) == text
    config = depth.applied(
        MINI_FAMILY.unet | {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": (1, 2, 2, 2)}
    )
    assert Depth.from_config(config) == depth
    unet = UNet2DConditionModel(**config)
    assert Depth.from_config(unet.config) == depth
    for path, count in depth.transformers.items():
        assert len(unet.get_submodule(path).transformer_blocks) == count
    assert all(unet.get_submodule(path) for path in depth.resnets)
    assert (unet.mid_block is None) == (depth.mid is None)


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        (KOALA_1B, (1_161_184_324, 270_656_000, 274_094_080, 609_114_240)),
        (KOALA_700M, (782_822_724, 235_900_160, 0, 539_602_560)),
    ],
)
def test_fewer_layers_and_no_middle_have_the_published_counts(text: str, parameters: tuple[int, ...]) -> None:
    """KOALA (arXiv 2312.04005), counted on meta tensors."""
    unet = meta_unet(Architecture(name=text, family=SDXL_FAMILY, depth=Depth.parse(text)))
    parts = (unet, unet.down_blocks, unet.mid_block, unet.up_blocks)
    assert tuple(count_parameters(part) if part is not None else 0 for part in parts) == parameters


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("2,2/4,4", "is not of the form DOWN:MID:UP"),
        ("-/²/2:0:2,2/2,2/-", "is not of the form"),
        ("-/2,2/4,4:3:4,4,10/2,1,1/-", r"middle block's 3 transformer blocks must be 0 or equal to the 4"),
        ("-/2,2/4,4:0:4,4/2,1,1/-", "one layer more on the way up"),
        ("-/2,2/4,4:0:4,4,10/2,1,1", "one layer more on the way up"),
        ("-/2,0/4,4:0:4,4,10/2,1,1/-", "all have transformer blocks behind them"),
        (f"{'1,' * 500}1:0:{'1,' * 501}1", "the depth has 1003 layers; the most is 1000"),
        ("-/2,2/100000000,4:0:4,4,10/2,1,1/-", "more than 10000 transformer blocks"),
        (f"-/2,2/{'9' * 4000},4:0:4,4,10/2,1,1/-", "more than 10000 transformer blocks"),
    ],
)
def test_what_diffusers_cannot_express_is_refused(text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        Depth.parse(text)


def test_more_levels_than_the_family_has_are_refused() -> None:
    with pytest.raises(UserError, match="has 4 levels, this family 3"):
        Depth.parse("1/1/1/-:1:-/1,1/1,1/1,1").applied(SDXL_FAMILY.unet)
