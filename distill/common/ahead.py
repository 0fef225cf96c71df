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


class Awaited(Generic[Made]):
    """An iterator that keeps count of the `seconds` spent waiting for its items."""

    def __init__(self, items: Iterable[Made]) -> None:
        self.seconds = 0.0
        self._items = iter(items)

    def __iter__(self) -> Iterator[Made]:
        return self

    def __next__(self) -> Made:
        began = time.monotonic()
        try:
            return next(self._items)
        finally:
            self.seconds += time.monotonic() - began
