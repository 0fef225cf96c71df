import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.floor.predict import Known
from bench.report.inputs import read_inputs
from bench.search import costs
from bench.search.options import SearchOptions
from bench.search.search import downscaled, find_gpu, run_search
from distill.common.errors import UserError
from distill.data.make_cache import make_cache
from distill.training.objectives import Distill
from distill.training.recipes import find_recipe


@pytest.fixture(scope="module")
def cache(mini_vega: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("search") / "cache"
    make_cache(mini_vega, "shapes:2", out)
    return out


@pytest.fixture
def options(mini_vega: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SearchOptions:
    """Known latencies are given, since to count the full-size models takes many seconds."""
    measured = {"rtx4090-fp16acc": 2470.0, "a100-sxm": 2742.0}
    known = [Known(gpu, "sdxl", 30, "TensorRT", total, 1300.0, "published") for gpu, total in measured.items()]
    monkeypatch.setattr(costs, "published_known", lambda: known)
    return SearchOptions(
        model=str(mini_vega), cache=str(cache), out=tmp_path / "out", speedup=(1.05,), samples=1, timesteps=1,
        exchanges=3, random_cuts=1,
    )  # fmt: skip


def test_a_search_writes_a_front_and_a_recipe_that_is_one_and_goes_on_where_it_was(options, capsys) -> None:
    run_search(options)
    front = json.loads((options.out / "search.json").read_text())
    assert read_inputs([options.out / "search.json"]).fronts[0].workload == {
        "resolution": "128x128",
        "steps": 30,
        "batch": 1,
        "guidance_scale": 5.0,
    }
    ways = [student["way"] for student in front["students"]]
    assert {"greedy", "search", "one-shot", "random", "published"} == set(ways)
    found = front["students"][ways.index("search")]
    assert found["speedup"]["value"] >= 1.05 and found["speedup"]["low"] < found["speedup"]["high"]
    recipe = find_recipe(str(options.out / front["recipes"]["1.05x"]))
    assert recipe.stages[0].teacher == options.model
    assert all(isinstance(stage.objective, Distill) for stage in recipe.stages)  # no few-step road
    assert recipe.stages[-1].student.architecture == found["depth"]
    assert (options.out / "search.svg").stat().st_size and "| search | 1.05x |" in (
        options.out / "search.md"
    ).read_text()
    scores = (options.out / "scores.jsonl").read_text()
    run_search(options)
    assert (options.out / "scores.jsonl").read_text() == scores
    with pytest.raises(UserError, match="holds a search with another timesteps; choose another --out"):
        run_search(replace(options, timesteps=2))
    with pytest.raises(UserError, match="holds a search with another downscale"):
        run_search(replace(options, downscale=2))


def test_what_cannot_be_searched_is_one_line(options, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(options.model, other)
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    for change, told in (
        ({"speedup": (9.0,)}, "no student meets 9x: the smallest, .* parameters; fewer steps"),
        ({"parameters": (1000,)}, "no student meets 1,000 parameters"),
        ({"gpu": "rtx9090"}, "unknown GPU 'rtx9090'.*h200"),
        ({"runtime": "fast"}, "no published latency is of the runtime 'fast', only of TensorRT"),
        ({"resolution": "100x100"}, "multiples"),
        ({"model": str(other)}, "the cache was made with another .* python -m distill cache --model"),
    ):
        with pytest.raises(UserError, match=told):
            run_search(replace(options, **change))
        assert not options.out.exists(), change
    options.out.mkdir()
    (options.out / "holiday.jpg").touch()
    with pytest.raises(UserError, match=r"holds holiday\.jpg"):
        run_search(options)
    with pytest.raises(UserError, match="no budget"):
        replace(options, speedup=())


def test_a_gpu_is_named_by_its_first_part() -> None:
    assert [find_gpu(name) for name in ("a100", "rtx4090", "h200")] == ["a100-sxm", "rtx4090-fp16acc", "h200"]


def test_pictures_are_scored_small_at_sizes_that_the_levels_can_halve() -> None:
    latents = torch.rand(1, 4, 104, 152)
    assert torch.equal(downscaled(latents, 1, 4), latents)
    small = downscaled(latents, 4, 4)
    assert small.shape == (1, 4, 24, 40)
    assert small.mean().item() == pytest.approx(latents.mean().item(), abs=0.01)
    assert downscaled(latents, 100, 4).shape == (1, 4, 4, 4)
