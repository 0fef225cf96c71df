import json

import pytest

from bench.contestants.inventory import MAX_POINTS, describe, kind_of, parse_artifacts, read_losses
from distill.common.errors import UserError


def write_losses(path, lines):
    path.write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "1", "st'
    )  # a killed run's last line


def test_losses_are_thinned_grouped_and_keep_their_ends(tmp_path):
    lines = [
        {"stage": stage, "step": step, "seconds": step / 10, "lr": 1e-4, "loss": 1 / step, "terms": {"task": 0.5}}
        | {"terms": {"task": 0.5, "feature/down.0": 1.0, "feature/up.1": 2.0}}
        for stage in ("1-first", "2-second")
        for step in range(1, 2001)
    ]
    write_losses(tmp_path / "losses.jsonl", lines)
    curves = read_losses(tmp_path / "losses.jsonl")
    assert [curve["stage"] for curve in curves] == ["1-first", "2-second"]
    for curve in curves:
        assert len(curve["points"]) <= MAX_POINTS + 20
        assert curve["points"][0][0] == 1 and curve["points"][-1][0] == 2000
        assert curve["points"][0][2] == {"task": 0.5, "feature": 3.0}
        assert curve["steps"] == 2000 and curve["seconds"] == 200
    assert read_losses(tmp_path / "none.jsonl") == []


def test_folders_are_told_by_what_they_hold(tmp_path):
    for name, file in (("checkpoint", "unet/config.json"), ("onnx", "unet/model.onnx"), ("bundle", "manifest.json")):
        path = tmp_path / name / file
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        assert kind_of(tmp_path / name) == name
    assert describe(tmp_path / "checkpoint")["losses"] == []
    (tmp_path / "onnx/unet/export.json").write_text('{"seconds": 41.5, "nodes": 7}')
    assert describe(tmp_path / "onnx")["components"]["unet"] == {"bytes": 2 + 29, "seconds": 41.5}
    with pytest.raises(UserError, match="schema version"):
        describe(tmp_path / "bundle")
    with pytest.raises(UserError, match="is no folder"):
        kind_of(tmp_path / "absent")


def test_artifacts_belong_to_contestants(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    found = parse_artifacts([f"a={tmp_path}"], ["a", "b"])
    assert list(found["a"]) == [tmp_path] and found["a"][tmp_path]["kind"] == "checkpoint" and found["b"] == {}
    with pytest.raises(UserError, match="NAME=FOLDER"):
        parse_artifacts(["a"], ["a"])
    with pytest.raises(UserError, match="unknown contestant"):
        parse_artifacts([f"c={tmp_path}"], ["a"])
