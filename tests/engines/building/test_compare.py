"""The comparison of layouts: its arithmetic, and that its figures come from real builds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.common.errors import UserError
from engines.building.compare import LayoutCost, compare_layouts, ratios, with_baselines
from tests.engines.toys import make_static, make_toy_onnx


def cost(layout: str, seconds: float, disk: int, component: str = "unet") -> LayoutCost:
    return LayoutCost(layout, component, 1, 1, seconds, seconds / 2, 100, disk, 10)


def test_ratios_are_to_the_static_builds_of_the_same_component() -> None:
    costs = [cost("ranged", 5, 11), cost("per-resolution", 20, 99), cost("per-resolution", 7, 7, "vae_decoder")]
    pairs = with_baselines(costs)
    assert ratios(*pairs[0]) == {"time": 0.25, "cpu": 0.25, "memory": 1.0, "disk": pytest.approx(11 / 99)}
    assert ratios(*pairs[2]) == {"time": 1.0, "cpu": 1.0, "memory": 1.0, "disk": 1.0}
    assert costs[0].disk_over_weights == 1.1


def test_layouts_are_built_and_compared(toy_onnx_fp16: Path, tmp_path: Path) -> None:
    compare_layouts(
        toy_onnx_fp16, tmp_path, gpus=["a100"], layouts=["per-resolution", "shared", "ranged"], components=["unet"]
    )
    rows = {row["layout"]: row for row in json.loads((tmp_path / "layouts.json").read_text())["layouts"]}
    assert [(rows[name]["plans"], rows[name]["profiles"]) for name in ("per-resolution", "shared", "ranged")] == [
        (9, 9),
        (1, 9),
        (1, 1),
    ]
    assert rows["ranged"]["ratios"]["disk"] < rows["shared"]["ratios"]["disk"] < 1
    assert all(row["build_s"] > 0 and row["cpu_s"] > 0.1 and row["peak_rss_bytes"] > 1e8 for row in rows.values())
    assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize(
    "asked, message",
    [
        ({}, "shared is there already, and is not touched"),
        ({"layouts": ["static"]}, "unknown layout 'static'"),
        ({"layouts": []}, "--layouts names none"),
        ({"components": []}, "--components names none"),
    ],
)
def test_what_cannot_be_compared_is_refused_and_nothing_is_removed(tmp_path: Path, asked: dict, message: str) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=message):
        compare_layouts(tmp_path / "onnx", tmp_path, gpus=["a100"], **asked)
    assert (tmp_path / "shared" / "thesis.txt").exists()


def test_what_one_layout_cannot_build_is_told_before_the_first_is_built(tmp_path: Path) -> None:
    static = make_static(make_toy_onnx(tmp_path / "onnx", "fp16"), ["128x128", "224x96"], batch=2)
    with pytest.raises(UserError, match="a static graph for each resolution, layout shared needs one graph for all"):
        compare_layouts(static, tmp_path / "out", gpus=["a100"])
    assert not (tmp_path / "out").exists()
