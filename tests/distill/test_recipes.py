from __future__ import annotations

import pytest

from distill.architectures import SDXL_DEPTH, SSD_1B_DEPTH, Depth, find_architecture
from distill.errors import UserError
from distill.layer_map import inherit_layer_map, make_layer_map, relative_map
from distill.recipes import RECIPES, find_recipe

SHALLOW = "-/1,1/3,3:3:3,3,3/1,1,1/-"  # keeps three blocks of the middle
INDICES = {"down_blocks.2.attentions.0": (0, 4, 9), "mid_block.attentions.0": (1, 2, 3)}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_end_in_the_student_they_are_named_after(name: str) -> None:
    recipe = find_recipe(name)
    assert recipe.name == name and recipe.stages[-1].student == name


def test_published_figures_stand_in_the_published_recipes() -> None:
    recipe = find_recipe("ssd-1b")
    assert sum(stage.steps for stage in recipe.stages) == 251_000
    assert recipe.batch_size == 32 * 4 and {stage.learning_rate for stage in recipe.stages} == {1e-5}


@pytest.mark.parametrize("name", RECIPES)
def test_only_one_part_gets_shorter_at_a_time(name: str) -> None:
    depths = [find_architecture(stage.student).depth for stage in find_recipe(name).stages]
    begin = SDXL_DEPTH if "ssd" in name else SSD_1B_DEPTH
    for before, after in zip([begin, *depths[:-1]], depths, strict=True):
        assert sum(getattr(before, side) != getattr(after, side) for side in ("down", "mid", "up")) <= 1


def test_any_depth_goes_the_same_road_by_any_layer_map() -> None:
    recipe = find_recipe("ssd-1b", student=SHALLOW, layer_map=INDICES)
    assert [stage.name for stage in recipe.stages[:2]] == ["shorten-up", "shorten-mid-down"]
    assert recipe.stages[-1].student == SHALLOW
    held = None
    for stage in recipe.stages:
        depth = Depth.parse(stage.student)
        layer_map = inherit_layer_map(stage.layer_map, SDXL_DEPTH, depth, held)
        relative_map(layer_map, held)
        held = layer_map
    assert held is not None and {path: held[path] for path in INDICES} == INDICES
    assert held["up_blocks.0.attentions.0"] == (0, 1, 2)


def test_what_stays_as_deep_keeps_the_blocks_it_has() -> None:
    """A Vega started from an SSD-1B that was made by another layer map than Vega's recipe has."""
    held = dict(make_layer_map("first", SDXL_DEPTH, SSD_1B_DEPTH))
    stage = find_recipe("vega", layer_map="spread").stages[0]
    layer_map = inherit_layer_map(stage.layer_map, SDXL_DEPTH, find_architecture(stage.student).depth, held)
    assert layer_map["down_blocks.2.attentions.0"] == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "ssd1b"}, "did you mean 'ssd-1b'"),
        ({"student": "-/2,2:0:1"}, "not of the form DOWN:MID:UP|SDXL topology"),
        ({"student": "-/2,2/11,11:0:1,1,1/1,1,1/-", "layer_map": "first"}, "its teacher only 10"),
        ({"layer_map": "last"}, "unknown layer map 'last'"),
        ({"layer_map": {"down_blocks.2.attentions.0": (0, 1, 1, 2)}}, "4 rising indices below 10"),
        ({"layer_map": {"down_blocks.0.attentions.0": (0,)}}, "unknown transformer in the layer map"),
        ({"student": SHALLOW, "layer_map": "similarity"}, "knows no way from 10 blocks to 3"),
    ],
)
def test_a_student_or_layer_map_that_cannot_be_is_one_line(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_recipe("ssd-1b", **changes)
