from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.checkpoints.surgery import plan_surgery, unet_shapes
from distill.common.errors import UserError
from distill.models.architectures import (
    ARCHITECTURES,
    SDXL_DEPTH,
    SSD_1B_DEPTH,
    VEGA_DEPTH,
    Architecture,
    whole,
)
from distill.models.depth import Depth
from distill.models.module_map import LayerMap, ModuleMap, make_module_map, read_layer_map

LAST = "down_blocks.2.attentions.0"


STUDENTS = [found for found in ARCHITECTURES.values() if found.parameters and found is not whole(found.family)]


@pytest.mark.parametrize("student", STUDENTS, ids=lambda found: found.name)
def test_every_tensor_of_a_student_comes_from_one_of_the_teacher(student: Architecture) -> None:
    teacher = whole(student.family)
    shapes = [unet_shapes(one.unet_config) for one in (teacher, student)]
    plan = plan_surgery(*shapes, make_module_map("first", teacher.depth, student.depth))
    assert set(plan.sources) == set(shapes[1])
    assert set(plan.sources.values()).isdisjoint(plan.unused)
    assert set(plan.sources.values()) | set(plan.unused) == set(shapes[0])


def test_of_fewer_resnets_a_down_level_keeps_the_first_and_an_up_level_the_first_and_the_last() -> None:
    modules = make_module_map("first", SDXL_DEPTH, Depth.parse("-/2/6:-:6,6/2,2/-"))
    assert modules.source("down_blocks.1.resnets.0.conv1.weight") == "down_blocks.1.resnets.0.conv1.weight"
    assert modules.source("up_blocks.0.resnets.1.conv1.weight") == "up_blocks.0.resnets.2.conv1.weight"
    assert modules.source("up_blocks.0.attentions.1.transformer_blocks.5.norm1.weight").startswith(
        "up_blocks.0.attentions.2.transformer_blocks.5."
    )
    assert modules.source("up_blocks.0.upsamplers.0.conv.bias") == "up_blocks.0.upsamplers.0.conv.bias"
    assert modules.source("conv_in.weight") == "conv_in.weight"


def test_fewer_levels_are_the_first_ones_down_and_the_last_ones_up() -> None:
    teacher = Depth.parse("1,1/1,1/1,1/-:1:-/1,1,1/1,1,1/1,1,1")
    modules = make_module_map("first", teacher, Depth.parse("1/1/1:-:1,1/1,1/1,1"))
    assert modules.paths["down_blocks.2"] == "down_blocks.2"
    assert modules.paths["up_blocks.0.attentions.1"] == "up_blocks.1.attentions.2"


@pytest.mark.parametrize(
    ("layer_map", "kept"),
    [
        ("first", (0, 1, 2, 3)),
        ("spread", (0, 3, 6, 9)),
        ("similarity", (0, 1, 2, 6)),
        ({LAST: (2, 4, 6, 8)}, (2, 4, 6, 8)),
        ({LAST: (3, 9)}, (0, 1, 3, 9)),  # filled up with the first of the others
        ({}, (0, 1, 2, 3)),
    ],
)
def test_a_layer_map_says_which_blocks_are_kept(layer_map: str | LayerMap, kept: tuple[int, ...]) -> None:
    assert make_module_map(layer_map, SDXL_DEPTH, SSD_1B_DEPTH).blocks(LAST) == kept


def test_a_module_may_be_made_from_any_other_of_the_teacher() -> None:
    given = {"up_blocks.0.resnets.1": "up_blocks.0.resnets.1", "up_blocks.0.attentions.1": "up_blocks.0.attentions.1"}
    modules = make_module_map(given, SDXL_DEPTH, Depth.parse("-/2/6:-:6,6/2,2/-"))
    assert modules.source("up_blocks.0.resnets.1.conv1.bias") == "up_blocks.0.resnets.1.conv1.bias"
    assert (
        modules.paths["up_blocks.0.attentions.1.transformer_blocks.0"]
        == "up_blocks.0.attentions.1.transformer_blocks.0"
    )


@pytest.mark.parametrize(
    ("layer_map", "told"),
    [
        ("frist", "unknown layer map 'frist'.*did you mean 'first'"),
        ({"down_blocks.9": (0,)}, r"unknown module of the student in the layer map 'down_blocks\.9'"),
        ({LAST: (0, 10)}, "must be 4 rising indices below 10"),
        ({LAST: (3, 1)}, "rising"),
        ({LAST: ()}, "rising"),
        ({LAST: (0, 1, 2, 3, 4)}, "must be 4 rising"),
        ({"down_blocks.0": (0,)}, "indices are for transformers"),
        ({LAST: "down_blocks.7"}, "unknown module of the teacher|only 0"),
        ({"down_blocks.1": "nowhere"}, "unknown module of the teacher"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(layer_map: str | LayerMap, told: str) -> None:
    with pytest.raises(UserError, match=told):
        make_module_map(layer_map, SDXL_DEPTH, SSD_1B_DEPTH)


@pytest.mark.parametrize(
    ("teacher", "student", "told"),
    [
        (VEGA_DEPTH, SSD_1B_DEPTH, "the student has 2 blocks at down_blocks.1.attentions.0, its teacher only 1"),
        (SSD_1B_DEPTH, SDXL_DEPTH, "its teacher"),
        (Depth.parse("-/2/5:-:5,5/2,2/-"), Depth.parse("-/2/5:0:5,5/2,2/-"), "has a middle block, its teacher none"),
    ],
)
def test_a_student_with_more_than_its_teacher_is_refused(teacher: Depth, student: Depth, told: str) -> None:
    with pytest.raises(UserError, match=told):
        make_module_map("first", teacher, student)


def test_a_student_of_a_student_counts_the_teachers_blocks() -> None:
    held = make_module_map("similarity", SDXL_DEPTH, SSD_1B_DEPTH)
    modules = make_module_map({LAST: (2, 6)}, SDXL_DEPTH, VEGA_DEPTH, held)
    relative = modules.relative_to(held)
    assert modules.blocks(LAST) == (2, 6) and relative.blocks(LAST) == (2, 3)
    with pytest.raises(UserError, match=r"transformer_blocks\.9.*has dropped; it can be no deeper"):
        make_module_map({LAST: (2, 9)}, SDXL_DEPTH, VEGA_DEPTH, held).relative_to(held)


def test_a_transformer_that_stays_as_deep_keeps_what_the_earlier_student_has() -> None:
    held = make_module_map({LAST: (1, 3, 5, 7)}, SDXL_DEPTH, SSD_1B_DEPTH)
    same = make_module_map("first", SDXL_DEPTH, SSD_1B_DEPTH, held)
    assert same.blocks(LAST) == (1, 3, 5, 7)


def test_the_record_of_a_student_is_read_back(tmp_path: Path) -> None:
    modules = make_module_map("similarity", SDXL_DEPTH, VEGA_DEPTH)
    (tmp_path / "slimxl.json").write_text(json.dumps({"module_map": modules.as_dict()}))
    assert ModuleMap.of_student(tmp_path) == modules
    as_layer_map = read_layer_map(str(tmp_path / "slimxl.json"))
    assert make_module_map(as_layer_map, SDXL_DEPTH, VEGA_DEPTH) == modules
    assert ModuleMap.of_student(tmp_path / "elsewhere") is None
    paths = (
        {f"{LAST}.transformer_blocks.0": "mid_block"},
        {f"{LAST}.transformer_blocks.0": f"{LAST}.transformer_blocks.x"},
    )
    for record in (
        {},
        *({"module_map": {**modules.as_dict(), "paths": {**modules.paths, **wrong}}} for wrong in paths),
    ):
        (tmp_path / "slimxl.json").write_text(json.dumps(record))
        with pytest.raises(UserError, match="has no module_map"):
            ModuleMap.of_student(tmp_path)


@pytest.mark.parametrize(
    "stated",
    ["[]", "3", "null", '{"a": null}', '{"a": []}', '{"a": [[0]]}', '{"a": ["0"]}', '{"a": [true]}', '{"a": [0.5]}'],
)
def test_a_file_that_holds_no_layer_map_is_one_line(stated: str, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(stated)
    with pytest.raises(UserError, match="is no layer map; it should read like"):
        read_layer_map(str(tmp_path / "map.json"))


@pytest.mark.parametrize(
    ("layer_map", "told"),
    [
        ({f"{LAST}.transformer_blocks.1": f"{LAST}.transformer_blocks.0"}, "must be rising ones"),
        ({f"{LAST}.transformer_blocks.0": f"{LAST}.transformer_blocks.5"}, "must be rising ones"),
        ({"up_blocks.1": "up_blocks.0"}, "a level is not moved as a whole"),
        ({"up_blocks.0.resnets.0": "down_blocks.2.attentions.1"}, "is a module of another kind"),
    ],
)
def test_an_entry_that_taps_could_not_follow_is_refused(layer_map: LayerMap, told: str) -> None:
    with pytest.raises(UserError, match=told):
        make_module_map(layer_map, SDXL_DEPTH, SSD_1B_DEPTH)


def test_a_level_that_keeps_its_layers_keeps_their_places() -> None:
    held = make_module_map({LAST: "down_blocks.2.attentions.1"}, SDXL_DEPTH, SSD_1B_DEPTH)
    assert make_module_map("first", SDXL_DEPTH, SSD_1B_DEPTH, held) == held
    assert (
        held.source(f"{LAST}.transformer_blocks.3.norm1.bias")
        == "down_blocks.2.attentions.1.transformer_blocks.3.norm1.bias"
    )
