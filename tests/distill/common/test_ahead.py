"""Work done one item ahead: in order, in a thread, errors in their turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace

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
    ("data", "told"),
    [(3, "75% waiting for data: s3://b/cache is slower than the steps"), (0.1, "9% waiting for data")],
)
def test_a_place_that_is_slow_is_named(data: float, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each item takes `data` seconds, and each step one."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("distill.common.ahead.time", clock)

    def items() -> Iterator[None]:
        for _ in range(5):
            clock.now += data
            yield

    waited = Awaited(items(), "s3://b/cache")
    for _ in waited:
        clock.now += 1
    assert waited.describe() == told
