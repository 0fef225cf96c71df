"""Progress with time left: a bar on a terminal, plain lines where there is none (a log, CI)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


def say(text: str) -> None:
    """One line of progress, at once."""
    print(text, flush=True)


def track(items: Sequence[T], title: str, unit: str = "step", done: int = 0) -> Iterator[T]:
    """Yields `items`, showing how many are done (`done` were before) and the time left."""
    total = done + len(items)
    if sys.stdout.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            task = progress.add_task(title, total=total, completed=done)
            for item in items:
                yield item
                progress.advance(task)
        return
    started = told = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - told > SECONDS_BETWEEN_LINES or number == len(items):
            left = (now - started) / number * (len(items) - number)
            say(f"{title}: {unit} {done + number}/{total}, {left:.0f} s left")
            told = now
