from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.__main__ import main
from distill.common.errors import UserError
from distill.models.architectures import ARCHITECTURES, SDXL_DEPTH, SSD_1B_DEPTH, find_architecture
from distill.models.module_map import make_module_map
from distill.training.objectives import Consistency, GuidanceRange
from distill.training.recipes import PREVIOUS, RECIPES, few_steps, find_recipe, stage_modules
from distill.training.student import Pruned

SHALLOW = "-/1,1/3,3:3:3,3,3/1,1,1/-"  # keeps three blocks of the middle
INDICES = {"down_blocks.2.attentions.0": (0, 4, 9), "mid_block.attentions.0": (1, 2, 3)}


@pytest.mark.parametrize("name", [name for name in RECIPES if name in ARCHITECTURES])
def test_recipes_end_in_the_student_they_are_named_after(name: str) -> None:
    recipe = find_recipe(name)
    assert recipe.name == name and recipe.stages[-1].student.architecture == name


def test_published_figures_stand_in_the_published_recipes() -> None:
    recipe = find_recipe("ssd-1b")
    assert sum(stage.steps for stage in recipe.stages) == 251_000
    assert sum(stage.steps for stage in find_recipe("vega").stages) == 226_000, "its middle is short already"
    assert recipe.batch_size == 32 * 4 and {stage.learning_rate for stage in recipe.stages} == {1e-5}


def test_the_few_step_recipes_have_the_published_figures_and_follow_what_they_are_named_after() -> None:
    lcm = find_recipe("lcm-sdxl")
    [stage] = lcm.stages
    assert (lcm.batch_size, lcm.weight_decay, lcm.ema_decay, stage.steps) == (12, 0.0, None, 1000)
    assert stage.objective == Consistency(guidance=GuidanceRange(low=3.0, high=15.0), target_decay=0.95)
    assert (stage.learning_rate_at(500), stage.learning_rate_at(999)) == (1e-6, 1e-6)
    rounds = find_recipe("halving-sdxl").stages[1:]
    assert [(stage.objective.steps, stage.steps, stage.teacher) for stage in rounds] == [
        (steps, 50_000, PREVIOUS) for steps in (32, 16, 8, 4)
    ]
    assert rounds[0].learning_rate_at(49_999) < 1e-9
    for name, pruned in (("lcm-vega", "vega"), ("mini-lcm-vega", "mini-vega")):
        assert find_recipe(name).stages[:-1] == find_recipe(pruned).stages
        assert (find_recipe(name).stages[-1].teacher, find_recipe(name).batch_size) == (
            PREVIOUS,
            find_recipe(pruned).batch_size,
        )
    for name in few_steps.RECIPES:
        assert find_recipe(name).name == name
        assert find_recipe(name, student="mini-ssd-1b" if "mini" in name else "ssd-1b", layer_map="first").stages


def test_the_students_of_sd_and_koala_are_taught_as_published() -> None:
    small, tiny, base, koala = (
        find_recipe(name).stages[0] for name in ("small-sd", "tiny-sd", "bk-sdm-base", "koala-700m")
    )
    assert [stage.objective.feature for stage in (small, tiny, base)] == [0.5, 0.5, 1.0]
    assert tiny.objective.taps["down_blocks.2"] == "up_blocks.0" and "mid_block" not in base.objective.taps
    assert (small.learning_rate_at(99_999), base.learning_rate_at(0)) == (pytest.approx(0, abs=1e-12), 5e-5)
    assert (koala.steps, koala.objective.level) == (100_000, "self-attention")


@pytest.mark.parametrize("name", ["ssd-1b", "vega", "mini-ssd-1b", "mini-vega"])
def test_only_one_part_gets_shorter_at_a_time(name: str) -> None:
    depths = [find_architecture(stage.student.architecture).depth for stage in find_recipe(name).stages]
    begin = SDXL_DEPTH if "ssd" in name else SSD_1B_DEPTH
    for before, after in zip([begin, *depths[:-1]], depths, strict=True):
        assert sum(getattr(before, side) != getattr(after, side) for side in ("down", "mid", "up")) <= 1


def test_any_depth_goes_the_same_road_by_any_layer_map() -> None:
    recipe = find_recipe("ssd-1b", student=SHALLOW, layer_map=INDICES)
    assert [stage.name for stage in recipe.stages[:2]] == ["shorten-up", "shorten-mid-down"]
    assert recipe.stages[-1].student.architecture == SHALLOW
    maps = stage_modules(recipe, ARCHITECTURES["sdxl"])
    assert {path: maps[-1].blocks(path) for path in INDICES} == INDICES
    assert maps[-1].blocks("up_blocks.0.attentions.0") == (0, 1, 2)


def test_what_stays_as_deep_keeps_the_blocks_it_has() -> None:
    """A Vega started from an SSD-1B that was made by another layer map than Vega's recipe has."""
    held = make_module_map("first", SDXL_DEPTH, SSD_1B_DEPTH)
    student = find_recipe("vega", layer_map="spread").stages[0].student
    depth = find_architecture(student.architecture).depth
    modules = make_module_map(student.layer_map, SDXL_DEPTH, depth, held)
    assert modules.blocks("down_blocks.2.attentions.0") == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "ssd1b"}, "did you mean 'ssd-1b'"),
        ({"student": "-/2,2:0:1"}, "depth -/2,2:0:1: each level has one layer more"),
        ({"student": "-/2,2/11,11:0:1,1,1/1,1,1/-", "layer_map": "first"}, "its teacher only 10"),
        ({"layer_map": "last"}, "unknown layer map 'last'"),
        ({"layer_map": {"down_blocks.2.attentions.0": (0, 1, 1, 2)}}, "rising indices below 10"),
        ({"layer_map": {"down_blocks.0.attentions.0": (0,)}}, "unknown module of the student in the layer map"),
        ({"student": SHALLOW, "layer_map": "similarity"}, "knows no way from 10 blocks to 3"),
    ],
)
def test_a_student_or_layer_map_that_cannot_be_is_one_line(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_recipe("ssd-1b", **changes)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_printed_and_read_is_the_same_recipe(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By hand, and out of a student's slimxl.json."""
    monkeypatch.setattr("sys.argv", ["distill", "recipe", name])
    assert main() == 0
    file = tmp_path / "mine.json"
    file.write_text(capsys.readouterr().out)
    recipe = find_recipe(name)
    assert find_recipe(str(file)) == recipe and find_recipe(str(file)).as_dict() == recipe.as_dict()
    file.write_text(json.dumps({"key": "k", "recipe": recipe.as_dict()}))
    assert find_recipe(str(file)) == recipe


def test_explicit_indices_are_read_back(tmp_path: Path) -> None:
    file, indices = tmp_path / "mine.json", {"down_blocks.2.attentions.0": (0, 4, 9)}
    by_hand = find_recipe("ssd-1b", student=SHALLOW, layer_map=indices)
    file.write_text(json.dumps(by_hand.as_dict()))
    assert find_recipe(str(file)) == by_hand


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 4}, "no recipe: batch: unexpected keyword argument"),
        ({"batch_size": 0}, "no recipe: batch_size: input should be greater than 0"),
        ({"batch_size": 10**12}, "no recipe: batch_size: input should be less than or equal to 1000000"),
        ({"stages/name": "n" * 300}, "stages.0.name: string should have at most 100 characters"),
        ({"stages": []}, "no recipe: stages: tuple should have at least 1 item"),
        ({"name": "../../mine"}, "no recipe: name: string should match pattern"),
        ({"caption_dropout": 1.0}, "no recipe: caption_dropout: input should be less than 1"),
        ({"ema_decay": "0.9"}, "no recipe: ema_decay: input should be a valid number"),
        (
            {"stages/objective/level": "blocks"},
            "stages.0.objective.distill.level: input should be 'block', 'sub-block', 'layer' or",
        ),
        ({"stages/learning_rate": float("nan")}, "stages.0.learning_rate: input should be a finite number"),
        ({"stages/learning_rate": float("inf")}, "stages.0.learning_rate: input should be a finite number"),
        ({"max_grad_norm": float("inf")}, "no recipe: max_grad_norm: input should be a finite number"),
        ({"stages/schedule/floor": 1.5}, "stages.0.schedule.floor: input should be less than or equal to 1"),
        ({"stages/student/kind": "loha"}, "stages.0.student: input tag 'loha'"),
        ({"stages/student": {"kind": "lora", "rank": 0}}, "lora.rank: input should be greater than 0"),
        ({"stages/student": {"kind": "lora", "alpha": float("inf")}}, "lora.alpha: input should be a finite number"),
        (
            {"stages/student": {"kind": "lora"}, "stages/objective": {"kind": "consistency"}},
            "stages.0: value error, a LoRA leaves its UNet as it is: no objective that widens it",
        ),
        ({"stages/student": {"kind": "lora"}}, "stage shorten-mid trains a LoRA, .* it must be the only stage"),
        ({"stages/objective/kind": "lcm"}, "stages.0.objective: input tag 'lcm'"),
        ({"stages/student": 3}, "stages.0.student.pruned: input should be an object"),
        ({"stages/steps": 1.5}, "stages.0.steps: input should be a valid integer"),
        ({"stages/steps": 10**400}, "is beyond 64 bits"),
        (
            {"stages/objective/task": 0, "stages/objective/output": 0},
            "stages.0.objective.distill: value error, task or output must be above 0",
        ),
        ({"stages/teachr": "mine"}, "stages.0.teachr: unexpected keyword argument"),
        ({"stages/student/architecture": "ssd1b"}, "did you mean 'ssd-1b'"),
        (
            {"stages/student/layer_map": {"mid_block.attentions.0": [0]}},
            "unknown module of the student in the layer map",
        ),
        ({"stages/student/layer_map": {"down_blocks.2.attentions.0": [*range(-1, 9)]}}, "10 rising indices below 10"),
    ],
)
def test_a_faulty_recipe_file_is_one_line(change: dict, message: str, tmp_path: Path) -> None:
    recipe = json.loads(json.dumps(find_recipe("ssd-1b").as_dict()))
    for path, value in change.items():
        *above, key = path.split("/")
        part = recipe
        for name in above:
            part = part[name][0] if name == "stages" else part[name]
        part[key] = value
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(recipe))
    with pytest.raises(UserError, match=message):
        stage_modules(find_recipe(str(file)), ARCHITECTURES["sdxl"])


def test_what_is_no_recipe_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        find_recipe(str(tmp_path / "none.json"))
    file = tmp_path / "mine.json"
    file.write_text("[1]")
    with pytest.raises(
        UserError, match=r"mine.json is no recipe: the whole: .*`python -m distill recipe ssd-1b` prints"
    ):
        find_recipe(str(file))
    file.write_text('{"module_map": {}}')
    with pytest.raises(UserError, match="a student made by surgery, without a recipe"):
        find_recipe(str(file))
    file.write_text(json.dumps(find_recipe("vega").as_dict()))
    with pytest.raises(UserError, match="says its own student and layer_map: change it there"):
        find_recipe(str(file), student="vega", layer_map="first")
    with pytest.raises(UserError, match="the recipe vega-rt adapts its teacher as it is: it takes no student"):
        find_recipe("vega-rt", student="vega")
    with pytest.raises(UserError, match=r"unknown recipe 'vegan': known are FILE\.json, .*mini.*did you mean 'vega'"):
        find_recipe("vegan")


def test_a_student_may_be_named_by_its_architecture_alone(tmp_path: Path) -> None:
    stated = json.loads(json.dumps(find_recipe("ssd-1b").as_dict()))
    stated["stages"][-1]["student"] = "vega"
    (tmp_path / "mine.json").write_text(json.dumps(stated))
    assert find_recipe(str(tmp_path / "mine.json")).stages[-1].student == Pruned(architecture="vega")
