"""Work done one item ahead: in order, in a thread, errors in their turn."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator

import pytest

from distill.common.ahead import Awaited, ahead


def test_the_next_is_made_while_this_one_is_used() -> None:
    made = [threading.Event() for _ in range(4)]

    def make(number: int) -> int:
        made[number].set()
        return 10 * number

    for number, value in enumerate(ahead(make, range(4))):
        assert value == 10 * number
        assert number == 3 or made[number + 1].wait(5)
        assert number > 1 or not made[number + 2].wait(0.05), "two ahead would hold two batches"
    assert list(ahead(make, [])) == []


def test_an_error_comes_after_what_was_made_before_it() -> None:
    def make(number: int) -> int:
        return 6 // (2 - number)

    values: Iterator[int] = ahead(make, range(4))
    assert [next(values), next(values)] == [3, 6]
    with pytest.raises(ZeroDivisionError):
        next(values)


@pytest.mark.parametrize(
    ("data", "step", "told"),
    [
        (0.03, 0.001, r"\d+% waiting for data: s3://b/cache is slower than the steps"),
        (0.001, 0.03, r"\d+% waiting for data$"),
    ],
)
def test_a_place_that_is_slow_is_named(data: float, step: float, told: str) -> None:
    waited = Awaited((time.sleep(data) for _ in range(5)), "s3://b/cache")
    for _ in waited:
        time.sleep(step)
    assert re.match(told, waited.describe())
