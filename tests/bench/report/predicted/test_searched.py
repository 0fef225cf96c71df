"""A search's students in the report: predicted stands beside measured, and only where both mean the same."""

import json
from dataclasses import asdict

import pytest

from bench.floor.peaks import PEAKS
from bench.report.report import write_report
from bench.search.front import SEARCH_SCHEMA
from distill.common.errors import UserError
from distill.models.architectures import ARCHITECTURES

TEACHER, STUDENT = ARCHITECTURES["mini-sdxl"], ARCHITECTURES["mini-vega"]
GPU = PEAKS["a100-sxm"]


def student(way, name, depth, ms, speedup):
    latency, gain = ({"value": v, "low": 0.9 * v, "high": 1.1 * v} for v in (ms, speedup))
    return {"way": way, "name": name, "depth": str(depth), "parameters": 1, "latency_ms": latency, "speedup": gain} | {
        "change": 0.01
    }


@pytest.fixture
def files(results_path, tmp_path):
    """The fakes of depths that a search knows: 14 ms and 8 ms for 3 steps on a GPU of the list."""
    results = json.loads(results_path.read_text())
    results["peak"] = asdict(GPU)
    for record, architecture in zip(results["contestants"], (TEACHER, STUDENT), strict=True):
        record["configs"] = {"unet": json.dumps(architecture.configs["unet"])}
    load = results["cells"][0]["workload"]
    front = {
        "schema_version": SEARCH_SCHEMA,
        "teacher": "mini:<sdxl>",
        "depth": str(TEACHER.depth),
        "family": "mini",
        "gpu": GPU.name,
        "runtime": results["contestants"][0]["runtime"],
        "workload": {key: load[key] for key in ("resolution", "steps", "batch", "guidance_scale")},
        "latency_stands_on": "3 measured depths",
        "students": [
            student("greedy", "", TEACHER.depth, 14.0, 1.0),
            student("search", "1.8x", STUDENT.depth, 10.0, 1.4),
            student("published", "mini SSD-1B", ARCHITECTURES["mini-ssd-1b"].depth, 11.0, 1.3),
        ],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "search.json").write_text(json.dumps(front))
    return [tmp_path / "results.json", tmp_path / "search.json"], front


def report_of(paths, tmp_path):
    write_report(paths, tmp_path / "report")
    told = json.loads((tmp_path / "report" / "report.json").read_text())["searched"][0]["students"]
    return told, (tmp_path / "report" / "index.html").read_text()


def test_measured_students_stand_beside_their_prediction(files, tmp_path):
    told, page = report_of(files[0], tmp_path)
    by_depth = {one["depth"]: one for one in told}
    vega = by_depth[str(STUDENT.depth)]
    assert vega["contestant"] == "vega" and vega["measured_ms"]["value"] == pytest.approx(8, rel=1e-3)
    assert vega["error"] == pytest.approx(10 / 8 - 1, rel=1e-3)
    assert vega["measured_speedup"]["value"] == pytest.approx(14 / 8, rel=1e-3)
    assert by_depth[str(TEACHER.depth)]["error"] == pytest.approx(0, abs=1e-3)
    assert by_depth[str(ARCHITECTURES["mini-ssd-1b"].depth)]["error"] is None
    assert "off by 12.5 % in the median" in page and "mini:&lt;sdxl&gt;" in page


@pytest.mark.parametrize("change", [{"gpu": "another"}, {"runtime": "TensorRT"}, {"workload": {"resolution": "64x64"}}])
def test_what_was_measured_elsewhere_or_of_another_picture_is_not_compared(files, tmp_path, change):
    paths, front = files
    paths[1].write_text(json.dumps(front | change | {"workload": front["workload"] | change.get("workload", {})}))
    told, page = report_of(paths, tmp_path)
    assert [one["error"] for one in told] == [None, None] and "None of them was measured here" in page


def test_a_truncated_front_is_one_line(files, tmp_path):
    paths, front = files
    paths[1].write_text(json.dumps(front | {"students": [{}]}))
    with pytest.raises(UserError, match=f"does not keep to {SEARCH_SCHEMA}: students"):
        write_report(paths, tmp_path / "report")
