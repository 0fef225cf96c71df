from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.checkpoints.sources import MINI_TEACHERS
from distill.common.errors import UserError
from distill.data.shapes import wilson
from distill.models.families import MINI_FAMILY
from distill.studies import few_steps
from distill.studies.few_steps import Point, compare_steps, measure_latency, parse_point
from distill.training.objectives import Halving


def test_the_interval_is_wilsons() -> None:
    """Worked by hand: z² = 3.8415; of 90 right all is the one-sided case n / (n + z²)."""
    assert wilson(1.0, 90) == pytest.approx((90 / 93.8415, 1.0), abs=1e-4)
    assert wilson(0.5, 90) == pytest.approx((0.3988, 0.6012), abs=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mini:sdxl@4", "is not of the form NAME=MODEL@STEPS"),
        ("t=mini:sdxl", "is not of the form"),
        ("t=mini:sdxl@4,", "is not of the form"),
        ("t=mini:sdxl@0", "is not of the form"),
        (f"t=mini:sdxl@{'9' * 5000}", "is not of the form"),
        ("t=mini:sdxl@1001", "--steps is 1001"),
        ("t=nowhere@4", "neither a folder nor a known form"),
        ("t={few}@5", r"5 steps are more than this model's schedule has \(4\)"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        parse_point(text.format(few=_few_step_model(tmp_path)), tmp_path)


def _few_step_model(folder: Path) -> Path:
    """The mini teacher's folder by links, and what a student of halving says of itself."""
    model = folder / "few"
    model.mkdir()
    for item in MINI_TEACHERS["sdxl"].iterdir():
        (model / item.name).symlink_to(item)
    sampling = Halving(steps=4).sampling(None)
    (model / "slimxl.json").write_text(
        json.dumps({"sampling": {"steps": sampling.steps, "most_steps": 4, "one_pass": True}})
    )
    return model


def test_every_point_is_judged_once_and_told_against_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = []

    def judge(_folder: Any, *, steps: int, **_asked: Any) -> dict[str, float]:
        judged.append(steps)
        return {"all": 0.5}

    def latency(timed: list[Point]) -> list[dict[str, Any]]:
        faster = {"median": 2.0, "low": 1.9, "high": 2.1}
        return [{"name": one.name, "steps": one.steps, "ms": [], "median_ms": 7.0, "faster": faster} for one in timed]

    monkeypatch.setattr(few_steps, "judge_checkpoint", judge)
    monkeypatch.setattr(few_steps, "measure_latency", latency)
    few = _few_step_model(tmp_path)
    texts = ("teacher=mini:sdxl@8,4", f"few={few}@4", "few=mini:sdxl@4")
    points = [point for text in texts for point in parse_point(text, tmp_path)]
    assert [point.passes for point in points] == [16, 8, 4, 8]
    results = tmp_path / "results"
    for _ in range(2):
        report = compare_steps(points, results, pictures=90)
    assert judged == [8, 4], "one model in as many steps is judged once, whatever it is called"
    assert [row["name"] for row in report["rows"]] == ["teacher", "teacher", "few", "few"]
    rows = [
        line for line in (results / "few-steps.md").read_text().splitlines() if line.startswith(("| teacher", "| few"))
    ]
    assert (
        rows[1].startswith("| teacher | 4 | 8 |") and "| 2.0× | 7 | 2.0× (1.9–2.1) | 50% (40%–60%) | 50% |" in rows[1]
    )
    assert len(rows) == 3 and "| 50% (43%–57%) | 50%, 50% |" in rows[2], "two seeds of one name are one row"
    assert (results / "few-steps.svg").read_text().lstrip().startswith("<?xml")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "few-steps.json").write_text("{}")
    with pytest.raises(UserError, match=r"few-steps\.json"):
        compare_steps(points, tmp_path / "other", pictures=90)


def test_latency_is_of_models_in_turn_against_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known delays: ten milliseconds a step, a machine that slows by the round."""
    now, asked = [0.0], []

    class Pipe:
        def __init__(self, name: str) -> None:
            self.name = name

        def set_progress_bar_config(self, **_options: Any) -> None:
            pass

        def __call__(self, _caption: str, *, num_inference_steps: int, **_options: Any) -> None:
            asked.append((self.name, num_inference_steps))
            now[0] += 0.01 * num_inference_steps * (1 + len(asked) // 2)

    monkeypatch.setattr(few_steps, "load_pipeline", lambda folder, _dtype: Pipe(folder.name))
    monkeypatch.setattr(few_steps, "find_family", lambda _folder: MINI_FAMILY)
    monkeypatch.setattr(few_steps.time, "perf_counter", lambda: now[0])
    about = {"guidance_scale": 1.0, "passes": 1}
    points = [
        Point(name="a", folder=tmp_path / "x", steps=8, **about),
        Point(name="b", folder=tmp_path / "y", steps=2, **about),
    ]
    first, second = measure_latency(points)
    assert first["faster"] == {"median": 1.0, "low": 1.0, "high": 1.0} and len(first["ms"]) == 9
    assert second["faster"]["median"] == pytest.approx(4, rel=0.2) and second["name"] == "b"
    assert asked[:4] == [("x", 8), ("y", 2), ("y", 2), ("x", 8)], "another begins in each round"
