import json
from pathlib import Path

import pytest

from bench.measure.clock import Sample
from bench.measure.rounds import Cell
from bench.results import FIGURES, read_results, record_cell
from bench.workload import Workload
from distill.common.errors import UserError
from distill.models.resolution import Resolution


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not valid JSON"),
        ("[]", "no results file"),
        ('{"schema_version": "slimxl.bench.results/1"}', "results/1"),
        ('{"schema_version": "slimxl.bench.results/2"}', "created_utc: field required"),
    ],
)
def test_a_file_of_another_kind_is_one_line(tmp_path, content, told):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(UserError, match=told):
        read_results(path)
    with pytest.raises(UserError, match="does not exist"):
        read_results(tmp_path / "absent.json")


def edited(results_path, path, change):
    value = json.loads(results_path.read_text())
    change(value, value["cells"][0]["rows"][1])
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda value, row: row["samples"].clear(), "samples: list should have at least 1 item"),
        (lambda value, row: row["samples"][0].update(total_ms="4"), r"samples.0.total_ms: .* valid number"),
        (lambda value, row: row["samples"][0].update(total_ms=float("nan")), "NaN or infinity"),
        (lambda value, row: value["gpu"].update(reason=float("inf")), "NaN or infinity"),
        (lambda value, row: value.update(peak={"name": "GPU"}), "peak.tflops: field required"),
        (lambda value, row: value.update(more=1), "more: extra inputs"),
        (
            lambda value, row: row["samples"][0].update(total_ms=0.0),
            "sample 0: a call and its steps take more than 0 ms",
        ),
        (lambda value, row: row["samples"][1].update(steps_ms=[]), "sample 1: a call"),
        (lambda value, row: row.update(contestant="teacher"), "teacher, teacher stands there twice"),
        (lambda value, row: row.update(contestant="nobody"), "'nobody' is no contestant of this file"),
        (lambda value, row: value["cells"][0]["workload"].pop("batch"), "batch and steps are whole numbers"),
        (lambda value, row: value["cells"][0]["workload"].update(resolution="large"), "resolution is WIDTHxHEIGHT"),
        (lambda value, row: value["environment"].pop("cpu"), "environment: .*it has no cpu.model"),
        (lambda value, row: value["gpu"].update(identity=None), "gpu: .*it has no identity.name"),
        (lambda value, row: [cell["rows"].clear() for cell in value["cells"]], "no finished run"),
    ],
)
def test_a_file_that_does_not_keep_to_the_schema_is_one_line(tmp_path, results_path, change, told):
    with pytest.raises(UserError, match=told) as error:
        read_results(edited(results_path, tmp_path / "edited.json", change))
    assert "\n" not in str(error.value)


def test_figures_are_those_of_the_samples_whatever_the_file_says(tmp_path, results_path):
    kept = read_results(results_path)
    changed = edited(results_path, tmp_path / "a.json", lambda value, row: row.update(dict.fromkeys(FIGURES, -1)))
    without = edited(results_path, tmp_path / "b.json", lambda value, row: [row.pop(name) for name in FIGURES])
    assert read_results(changed) == read_results(without) == kept
    row = json.loads(results_path.read_text())["cells"][0]["rows"][1]
    assert row["total_ms"]["value"] == kept.cells[0].rows[1].total_ms.value, "and it says them"
    slower = edited(results_path, tmp_path / "c.json", lambda value, row: row["samples"][0].update(total_ms=1e6))
    assert read_results(slower).cells[0].rows[1].cv > 1


def test_nothing_is_compared_with_a_refused_baseline(results_path):
    cell = Cell(Workload(resolution=Resolution(64, 64), steps=1))
    for name, total in (("teacher", 4.0), ("vega", 2.0)):
        cell.samples[name] = [Sample(total, {"denoise": total}, [total], round=number) for number in range(6)]
        cell.warmups[name], cell.first_ms[name] = 1, [total]
    found = []
    for faults in ([], ["picture 0 is black"]):
        cell.faults["teacher"] = faults
        record = record_cell(cell, costs={}, peak=None, faults={})
        whole = dict(read_results(results_path)) | {"cells": [record]}
        found.append(type(read_results(results_path))(**whole).cells[0].rows[1].speedup)
    assert found[0].value == 2.0 and found[1] is None


def test_the_committed_results_are_read():
    files = list((Path(__file__).parents[2] / "bench" / "results").glob("*.json"))
    assert files and all(read_results(path).cells for path in files)
