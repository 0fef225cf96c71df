import json

import pytest

from bench import suite
from bench.retry import measured, set_aside, settle


def write(path, rows, low=None):
    """`rows` of a part that was stopped after its first visit: too few rounds for an interval."""
    cells = [{"rows": rows * [{"total_ms": {"value": 5.0, "low": low}}]}]
    path.write_text(json.dumps({"cells": cells, "contestants": [{"quality": {"passed": None}}]}))


@pytest.mark.parametrize(
    ("retry", "done", "stands"),
    [(None, False, 9), (1, False, 9), (9, False, 9), (10, False, 10), (1, True, 1)],
    ids=["wrote nothing", "got less far", "got as far", "got further", "is done"],
)
def test_what_stands_after_a_retry(tmp_path, retry, done, stands):
    path = tmp_path / "part.json"
    write(path, 9)
    set_aside(path)
    assert not path.exists()
    if retry is not None:
        write(path, retry)
    assert settle(path, done) is (stands == 9 and retry != 9)
    assert measured(path) == stands and [one.name for one in tmp_path.iterdir()] == ["part.json"]


def test_a_row_counts_without_its_interval_and_more_with_it(tmp_path):
    for number, low in ((9, None), (18, 4.0)):
        write(tmp_path / "part.json", 9, low)
        assert measured(tmp_path / "part.json") == number
    assert measured(tmp_path / "absent.json") == 0


def test_commands_that_are_killed_one_after_the_other_lose_nothing(tmp_path):
    """Without a record of the part, since each was killed before it made one."""
    asked = suite.SuiteOptions(out=tmp_path, models="mini-vega", resolutions="64x64", device="cpu")
    path = suite._open_session(asked).path("eager")
    write(path, 5)
    for rows in (1, 2):
        set_aside(path)
        write(path, rows)
    suite._open_session(asked)
    assert measured(path) == 5 and [one.name for one in tmp_path.iterdir()] == [path.name]
