"""The comparison of builds: layouts of one checkpoint, from what their manifests recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.common.errors import UserError
from engines.building.build import build_bundle
from engines.building.compare import compare_bundles
from tests.engines.toys import make_toy_onnx


def test_layouts_are_compared(toy_onnx_fp16: Path, tmp_path: Path) -> None:
    layouts = ("per-resolution", "shared", "ranged")
    for layout in layouts:
        build_bundle(toy_onnx_fp16, tmp_path / layout, gpus=["a100"], layout=layout, components=["unet"])  # type: ignore[arg-type]
    assert compare_bundles([tmp_path / layout for layout in layouts], tmp_path / "layouts.json") == 0
    rows = json.loads((tmp_path / "layouts.json").read_text())["rows"]
    assert [(row["layouts"], row["plans"], row["profiles"]) for row in rows] == [
        (["per-resolution"], 9, 9),
        (["shared"], 1, 9),
        (["ranged"], 1, 1),
    ]
    static, shared, ranged = (row["ratios"] for row in rows)
    assert set(static.values()) == {1.0} and ranged["disk_bytes"] < shared["disk_bytes"] < 1
    assert all(row["build_s"] > 0 and row["cpu_s"] > 0.1 and row["peak_rss_bytes"] > 1e8 for row in rows)


def test_what_cannot_be_compared_is_refused(toy_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two bundles or more"):
        compare_bundles([toy_bundle], None)
    other = make_toy_onnx(tmp_path / "onnx", source="other")
    build_bundle(other, tmp_path / "bundle", gpus=[], flavor="onnxruntime", components=["text_encoder"])
    with pytest.raises(UserError, match="of different checkpoints: toy, other"):
        compare_bundles([toy_bundle, tmp_path / "bundle"], None)
