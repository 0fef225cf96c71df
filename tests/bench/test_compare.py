import json
import shutil

import numpy as np
import pytest

from bench.compare import UNKNOWN, change_of, compare_files, compare_results, read_side, verdict_of
from bench.measure.stats import Estimate
from bench.results import read_results
from distill.common.errors import UserError


@pytest.fixture(scope="module")
def results_path(results_path, tmp_path_factory):
    """As measured on a machine that was quiet."""

    def quiet(value):
        for cell in value["cells"]:
            for row in cell["rows"]:
                row["observed"] = []

    return changed(tmp_path_factory.mktemp("quiet") / "results.json", results_path, quiet)


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
                for sample in row["samples"] if row["contestant"] == "vega" else ():
                    sample["total_ms"] *= factor
                    sample["stages_ms"] = {stage: taken * factor for stage, taken in sample["stages_ms"].items()}

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


def test_too_few_runs_are_no_all_clear(tmp_path, results_path, capsys):
    few = changed(tmp_path / "few.json", results_path, scale(10, rounds=5))
    assert compare_files(results_path, few, 0.02) == UNKNOWN
    told = capsys.readouterr().out
    assert "fewer than six runs" in told and "no regression" not in told


def test_what_shifts_all_contestants_is_the_machines(tmp_path, results_path, capsys):
    def shift(value):
        for cell in value["cells"]:
            for row in cell["rows"]:
                for sample in row["samples"]:
                    sample["total_ms"] *= 1.5

    assert compare_files(results_path, changed(tmp_path / "slow.json", results_path, shift), 0.02) == 0
    told = capsys.readouterr().out
    assert "machine" in told and "slower" not in told


def test_a_row_with_a_diagnosis_is_unknown_until_several_launches_say_what_noise_is(tmp_path, results_path, capsys):
    def doubted(value):
        scale(1.5)(value)
        for cell in value["cells"]:
            cell["rows"][0]["observed"] = ["not alone: 2 other process(es) on the GPU"]

    slow = changed(tmp_path / "slow.json", results_path, doubted)
    assert compare_files(results_path, slow, 0.02) == UNKNOWN
    assert "unknown: not alone" in capsys.readouterr().out
    for side, file in (("before", results_path), ("after", slow)):
        (tmp_path / side).mkdir()
        for launch in range(3):
            shutil.copy(file, tmp_path / side / f"{launch}.json")
    assert read_side(tmp_path / "after").cells[0].rows[1].launches == 3
    assert compare_files(tmp_path / "before", tmp_path / "after", 0.02) == 1
    assert compare_files(tmp_path / "before", tmp_path / "before", 0.02) == 0
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no results file"):
        read_side(tmp_path / "none")


def test_launches_of_one_thing_rarely_differ_and_ten_percent_is_found():
    """Launches that differ by 2 %, rounds within one by 5 %; python -m tests.bench.false_alarms counts on a true machine."""
    rng = np.random.default_rng(0)

    def verdicts(factor, launches):
        sides = [[by * rng.normal(1, 0.02, (launches, 1)) * rng.normal(1, 0.05, (launches, 8)) for by in (1, factor)]
                 for _ in range(400)]  # fmt: skip
        return [verdict_of(change_of(*pair), 0.02) for pair in sides]

    same = verdicts(1.0, 5)
    assert same.count("slower") + same.count("faster") < 0.02 * 400 and same.count("same") > 0.95 * 400
    assert verdicts(1.1, 5).count("slower") > 0.9 * 400
    assert verdicts(1.1, 2).count("slower") < 0.5 * 400, "two launches say hardly anything, and are not trusted to"


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (Estimate(value=1.01, low=0.95, high=1.07), "same"),
        (Estimate(value=1.05, low=1.01, high=1.09), "same"),
        (Estimate(value=1.05, low=0.99, high=1.11), "unknown"),
        (Estimate(value=1.48, low=0.9, high=2.4), "unknown"),
        (Estimate(value=1.3), "unknown"),
        (Estimate(value=1.1, low=1.05, high=1.15), "slower"),
        (Estimate(value=0.9, low=0.85, high=0.95), "faster"),
    ],
)
def test_slower_is_what_lies_beyond_the_tolerance_whole_and_same_what_leaves_no_room_for_ten_percent(change, verdict):
    assert verdict_of(change, 0.02) == verdict


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
    def refuse(value):
        value["cells"][0]["rows"][1]["observed"] = ["refused: black"]

    good, bad = read_results(results_path), read_results(changed(tmp_path / "r.json", results_path, refuse))
    verdicts = [
        next(one.verdict for one in compare_results(*pair) if one.contestant == "vega")
        for pair in ((good, bad), (bad, good))
    ]
    assert verdicts == ["broken", "mended"]


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
