"""Progress with time left: a bar on a terminal, plain lines where there is none (a log, CI)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


def say(text: str) -> None:
    """One line of progress, at once."""
    print(text, flush=True)


def track(
    items: Sequence[T], title: str, unit: str = "step", done: int = 0, note: Callable[[], str] = str
) -> Iterator[T]:
    """Yields `items`, showing how many are done (`done` were before), the time left and what `note` says then."""
    total = done + len(items)
    if sys.stdout.isatty():
        texts = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
        with Progress(texts[0], BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), texts[1]) as progress:
            task = progress.add_task(title, total=total, completed=done, note=note())
            for item in items:
                yield item
                progress.update(task, advance=1, note=note())
        return
    started = told = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - told > SECONDS_BETWEEN_LINES or number == len(items):
            left = (now - started) / number * (len(items) - number)
            say(", ".join(filter(None, (f"{title}: {unit} {done + number}/{total}, {left:.0f} s left", note()))))
            told = now
