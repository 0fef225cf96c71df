import json

import pytest

from bench.suite import FLAVOR_MODULES, SuiteOptions, run_suite
from distill.errors import UserError


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"models": "sdxk"}, "did you mean 'sdxl'"),
        ({"models": "sdxl,mini-vega"}, "one family"),
        ({"jobs": "eager,magic"}, "unknown job"),
    ],
)
def test_bad_input_is_one_line(tmp_path, changes, word):
    with pytest.raises(UserError, match=word):
        run_suite(SuiteOptions(out=tmp_path, device="cpu", **changes))


def test_a_missing_runtime_and_spent_time_are_said_and_survived(tmp_path, monkeypatch):
    monkeypatch.setitem(FLAVOR_MODULES, "tensorrt", "no_such_module")
    options = {"out": tmp_path, "workdir": tmp_path / "w", "device": "cpu", "models": "mini-vega"}
    assert run_suite(SuiteOptions(jobs="tensorrt", **options)) == 1
    notes = json.loads(next(tmp_path.glob("*_notes.json")).read_text())["left_out"]
    assert len(notes) == 1 and "no_such_module is not installed" in notes[0]
    assert run_suite(SuiteOptions(jobs="eager,compiled", minutes=0.1, **options)) == 1
    notes = json.loads(next(tmp_path.glob("*_notes.json")).read_text())["left_out"]
    assert notes == ["eager: no time left", "compiled: no time left"]


def test_the_eager_job_leaves_results_and_a_report(tmp_path):
    options = SuiteOptions(
        out=tmp_path / "results",
        workdir=tmp_path / "w",
        device="cpu",
        models="mini-ssd-1b,mini-vega",
        resolutions="64x64",
        steps=1,
        minutes=20,
        max_rounds=6,
        jobs="eager,training",
    )
    assert run_suite(options) == 0
    names = sorted(path.name.rpartition("_")[2] for path in (tmp_path / "results").iterdir())
    assert names == ["eager.json", "notes.json", "report", "training.json"]
    training = json.loads(next((tmp_path / "results").glob("*_training.json")).read_text())["rows"][0]
    assert training["samples_per_s"] > 0 and training["mfu"] is None and training["mfu_why"]
