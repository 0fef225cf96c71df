import json
from pathlib import Path

import pytest

from bench.reading import read_inputs, read_results
from distill.common.errors import UserError


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("{", "not valid JSON"),
        ("[]", "no results file"),
        ('{"schema_version": "slimxl.bench.results/0"}', "results/0"),
        ('{"schema_version": "slimxl.bench.results/1"}', "created_utc"),
    ],
)
def test_a_results_file_of_another_kind_is_one_line(tmp_path, content, word):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(UserError, match=word):
        read_results(path)
    with pytest.raises(UserError, match="does not exist"):
        read_results(tmp_path / "absent.json")


def edited(place, value):
    """`place` is a path of keys to what is set to `value`, or taken away where that is None."""

    def edit(whole):
        *path, last = place
        for key in path:
            whole = whole[key]
        if value is None:
            del whole[last]
        else:
            whole[last] = value

    return edit


ROW = ("cells", 0, "rows", 1)
ENERGY = {"j_per_image": 5.0, "mean_power_w": 300.0, "seconds": 10.0, "images": 6}


def test_intervals_and_stages_are_those_of_the_samples_by_whatever_method_they_were_made(tmp_path, results_path):
    value = json.loads(results_path.read_text())
    edited((*ROW, "total_ms", "high"), 99.0)(value)
    edited((*ROW, "speedup", "low"), 0.5)(value)
    edited((*ROW, "stages_ms", "denoise"), 0.5)(value)
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(value))
    assert read_results(path).cells == read_results(results_path).cells


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (edited(("baseline",), "nobody"), "'nobody' stands 0 times among its contestants"),
        (edited(("contestants", 1), None), "'vega' stands 0 times"),
        (edited(("environment", "cpu"), None), "environment.cpu: Field required"),
        (edited(("gpu", "identity"), None), "gpu.identity: Field required"),
        (edited(("peak",), {"name": "GPU"}), "peak.tflops: Field required"),
        (edited(("cells", 0, "workload", "resolution"), "large"), "workload.resolution"),
        (edited((*ROW, "samples", 0, "round"), None), "samples.0.round: Field required"),
        (edited(("contestants", 0, "cold"), {}), "cold.load_ms: Field required"),
        (edited((*ROW, "total_ms", "value"), 4.0), "contradicts itself: total_ms of vega at 1024x1024"),
        (edited((*ROW, "speedup", "value"), 9.0), "speedup of vega"),
        (edited((*ROW, "percentiles_ms", "p90"), 5.0), "percentiles_ms of vega"),
        (edited((*ROW, "images_per_s"), 500.0), "images_per_s of vega"),
        (edited((*ROW, "step_ms"), 0.5), "step_ms of vega"),
        (edited((*ROW, "cv"), 0.5), "cv of vega"),
        (edited(("contestants", 1, "energy"), ENERGY), "j_per_image of vega is 5.0, and by its own .* 500.0"),
        (edited((*ROW, "samples", 0, "steps_ms"), []), "samples.0.steps_ms: List should have at least 1 item"),
    ],
)
def test_a_results_file_that_was_edited_is_one_line(tmp_path, results_path, edit, word):
    value = json.loads(results_path.read_text())
    edit(value)
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=word) as error:
        read_results(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "schema",
    ["slimxl.bench.training/1", "slimxl.bench.acceptance/1", "slimxl.bench.session/1", "slimxl.distill.bench/1"],
)
def test_a_file_of_only_its_schema_is_one_line(tmp_path, schema):
    path = tmp_path / "empty.json"
    path.write_text(json.dumps({"schema_version": schema}))
    with pytest.raises(UserError, match=f"does not keep to {schema}: .*: Field required"):
        read_inputs([path])


def test_the_committed_results_are_read():
    for path in (Path(__file__).parents[2] / "bench" / "results").glob("*.json"):
        read_inputs([path])


def test_results_without_a_run_are_refused(tmp_path, results_path):
    value = json.loads(results_path.read_text())
    for cell in value["cells"]:
        cell["rows"] = []
    path = tmp_path / "empty.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match="no finished run"):
        read_results(path)
