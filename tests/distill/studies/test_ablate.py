from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.checkpoints.sources import MINI_TEACHERS
from distill.common.errors import UserError
from distill.mini.judge import READER
from distill.studies.ablate import VARIANTS, make_recipe, run_ablation
from distill.training.recipes import Recipe

SMALL = {"steps": 6, "samples": 27, "held_out": 45, "pictures": 9, "picture_steps": 1, "jobs": 2, "seeds": 1}
HALF = "-/1,1/1,1:0:1,1,1/1,1,1/-"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_takes_the_same_steps_to_the_same_student(name: str) -> None:
    recipe: Recipe = make_recipe(
        name, VARIANTS[name], teacher=str(MINI_TEACHERS["sdxl"]), student="mini-vega", steps=400, seed=1
    )
    assert sum(stage.steps for stage in recipe.stages) == 400 and recipe.stages[-1].student.architecture == "mini-vega"
    assert len(recipe.stages) == (3 if "progressive" in name else 1)


def test_an_ablation_goes_on_where_it_was(
    mini_vega: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    for variants, new in ((["from-scratch"], 1), (["from-scratch", "layer-progressive"], 1)):
        run_ablation(mini_vega, tmp_path / "runs", results, variants=variants, student=HALF, **SMALL)
        assert f"{new}/{new} {variants[-1]}, seed 0: held-out loss" in capsys.readouterr().out
    report = json.loads((results / "ablation.json").read_text())
    assert [run["variant"] for run in report["runs"]] == ["from-scratch", "layer-progressive"]
    scratch, layers = (run["held_out_loss"] for run in report["runs"])
    assert report["teacher"]["held_out_loss"] > 0 and scratch != layers
    table = (results / "ablation.md").read_text()
    assert f"| layer-progressive | {layers:.5f} |" in table and "| teacher |" in table
    assert (results / "ablation.svg").read_text().startswith("<?xml")
    monkeypatch.setattr(
        "distill.studies.ablate.READER", READER + 1
    )  # then pictures are read again, and nothing is trained
    run_ablation(mini_vega, tmp_path / "runs", results, variants=["from-scratch"], student=HALF, **SMALL)
    assert "1/1 from-scratch, seed 0" in capsys.readouterr().out
    again = json.loads((results / "ablation.json").read_text())
    assert again["settings"]["reader"] == READER + 1
    assert again["runs"] == [report["runs"][0] | {"wall_s": again["runs"][0]["wall_s"]}]


def test_an_unknown_variant_is_refused(mini_vega: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown variant 'layers'.*did you mean 'layer'"):
        run_ablation(mini_vega, tmp_path, tmp_path, variants=["layers"], student=HALF, **SMALL)
