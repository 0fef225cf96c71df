import json
from dataclasses import replace

import pytest

from bench.compare import compare_files, verdict_on
from bench.results import read_results
from distill.common.errors import UserError


def changed(path, results_path, change):
    value = json.loads(results_path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    return path


def scale(factor, rounds=None):
    """Vega's samples times `factor`, and of all of them the first `rounds` alone."""

    def change(value):
        for cell in value["cells"]:
            for row in cell["rows"]:
                row["samples"] = row["samples"][:rounds]
                for sample in row["samples"]:
                    sample["total_ms"] *= factor if row["contestant"] == "vega" else 1

    return change


def test_a_file_against_itself_shows_no_change(results_path, capsys):
    assert compare_files(results_path, results_path, 0.02) == 0
    assert "no regression" in capsys.readouterr().out


def test_slower_beyond_noise_exits_1_and_faster_does_not(tmp_path, results_path, capsys):
    slow = changed(tmp_path / "slow.json", results_path, scale(1.5))
    assert compare_files(results_path, slow, 0.02) == 1
    assert "slower" in capsys.readouterr().out
    assert compare_files(slow, results_path, 0.02) == 0
    assert "faster" in capsys.readouterr().out


def test_within_overlapping_intervals_nothing_is_said(results_path):
    row = read_results(results_path).cells[0].rows[0]
    shifted = [replace(one, total_ms=one.total_ms + row.total_ms.high - row.total_ms.value) for one in row.samples]
    assert verdict_on(row, row.model_copy(update={"samples": shifted}), 0.0) == "same"


def test_too_few_runs_are_no_all_clear(tmp_path, results_path, capsys):
    assert compare_files(results_path, changed(tmp_path / "few.json", results_path, scale(10, rounds=5)), 0.02) == 1
    told = capsys.readouterr().out
    assert "unknown" in told and "no regression" not in told


def test_another_precision_under_the_same_name_is_told(tmp_path, results_path, capsys):
    def halved(value):
        value["contestants"][0]["precision"] = "fp16"

    assert compare_files(results_path, changed(tmp_path / "half.json", results_path, halved), 0.02) == 0
    assert "has another precision" in capsys.readouterr().out


def test_a_vanished_contestant_and_a_failed_guard_are_regressions(tmp_path, results_path):
    def drop(value):
        for cell in value["cells"]:
            cell["rows"] = [row for row in cell["rows"] if row["contestant"] != "vega"]

    assert compare_files(results_path, changed(tmp_path / "a.json", results_path, drop), 0.02) == 1

    def passed(state):
        def change(value):
            for record in value["contestants"]:
                record["quality"]["passed"] = state

        return change

    good = changed(tmp_path / "good.json", results_path, passed(True))
    bad = changed(tmp_path / "bad.json", results_path, passed(False))
    assert compare_files(good, bad, 0.02) == 1
    assert compare_files(bad, good, 0.02) == 0


def test_one_that_breaks_part_way_is_a_regression(tmp_path, results_path):
    def fail(value):
        value["cells"][1]["failures"] = {"vega": "RuntimeError: lost"}

    broken = changed(tmp_path / "broken.json", results_path, fail)
    assert compare_files(results_path, broken, 0.02) == 1
    assert compare_files(broken, broken, 0.02) == 0, "no more than before"
    assert compare_files(broken, results_path, 0.02) == 0


def test_a_refused_row_is_no_base(tmp_path, results_path):
    row = read_results(results_path).cells[0].rows[0]
    refused = row.model_copy(update={"observed": ["refused: black"]})
    assert [verdict_on(refused, row, 0.02), verdict_on(row, refused, 0.02)] == ["mended", "broken"]


@pytest.mark.parametrize("tolerance", [2.0, 1.0, -0.1, float("nan")])
def test_a_tolerance_is_a_share(results_path, tolerance):
    with pytest.raises(UserError, match="is a share"):
        compare_files(results_path, results_path, tolerance)


def test_files_with_nothing_in_common_are_a_users_mistake(tmp_path, results_path):
    def rename(value):
        for cell in value["cells"]:
            cell["name"] += " elsewhere"

    with pytest.raises(UserError, match="share no workload"):
        compare_files(results_path, changed(tmp_path / "x.json", results_path, rename), 0.02)
