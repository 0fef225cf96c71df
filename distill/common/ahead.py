"""The host's work for the next item while the device is busy with this one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

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
