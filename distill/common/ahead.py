"""The host's work for the next item while the device is busy with this one."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Generator[Made, None, None]:
    """`make(item)` of each item in order, in a thread that is one item ahead. What `make` raises is raised here, in
    its turn."""
    with ThreadPoolExecutor(1) as thread:
        next_one: Future[Made] | None = None
        for item in items:
            this_one, next_one = next_one, thread.submit(make, item)
            if this_one is not None:
                yield this_one.result()
        if next_one is not None:
            yield next_one.result()


SLOW = 0.2
"""A share of the time spent waiting that is worth doing something about."""


class Awaited(Generic[Made]):
    """An iterator that keeps count of the `seconds` spent waiting for its items, which come from `place`."""

    def __init__(self, items: Iterable[Made], place: str) -> None:
        self.seconds, self.place = 0.0, place
        self._items = iter(items)
        self._began = time.monotonic()

    def describe(self) -> str:
        """The share of the time since it began, and the place where that is much."""
        share = self.seconds / max(time.monotonic() - self._began, self.seconds, 1e-9)
        slow = f": {self.place} is slower than the steps" if share > SLOW else ""
        return f"{share:.0%} waiting for data{slow}"

    def __iter__(self) -> Iterator[Made]:
        return self

    def __next__(self) -> Made:
        began = time.monotonic()
        try:
            return next(self._items)
        finally:
            self.seconds += time.monotonic() - began
