"""Progress of several builds with the time left: a bar on a terminal, a line every ten seconds elsewhere.

rich estimates the time left from the speed of updates. TensorRT-RTX reports nothing for most of a profile, so here the
jobs' expected costs stand for what is not known yet, and between two reports the time left counts down.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

SECONDS_BETWEEN_LINES = 10.0


def duration(seconds: float) -> str:
    """`42 s` or `3 min 20 s`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


class BuildProgress:
    """`costs` are the expected seconds of each job."""

    def __init__(
        self, costs: list[float], console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Console(highlight=False, markup=False)
        self._costs, self._clock = costs, clock
        self._job, self._label, self._fraction = -1, "", 0.0
        self._started = self._ends = self._spoke = clock()
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._task = self._bar.add_task("", total=sum(costs))

    def __enter__(self) -> BuildProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @property
    def _done(self) -> float:
        """How many of the expected seconds of all jobs are done."""
        return sum(self._costs[: self._job]) + self._costs[self._job] * self._fraction

    @property
    def left(self) -> str:
        """The time left, as the last report had it."""
        seconds, total = self._ends - self._clock(), sum(self._costs)
        return f"about {duration(seconds)} left" if seconds > 0 else f"longer than the {duration(total)} expected"

    def _foresee(self) -> None:
        """When all will be done, at the pace so far. A tenth of all the work counts as done as expected beforehand, so that
        the first reports do not make the time left jump."""
        now, total = self._clock(), sum(self._costs)
        pace = (now - self._started + total / 10) / (self._done + total / 10)
        self._ends = now + pace * (total - self._done)

    def start(self, label: str) -> None:
        self._job, self._label, self._fraction = self._job + 1, label, 0.0
        self._foresee()
        self._show("started", always=True)

    def update(self, phase: str, fraction: float) -> None:
        """`fraction` of the running job is done, as far as the builder knows."""
        if fraction > self._fraction:
            self._fraction = fraction
            self._foresee()
        self._show(phase)

    def finish(self, summary: str) -> None:
        self._fraction = 1.0
        self.console.print(f"{self._head}: {summary}", soft_wrap=True)

    @property
    def _head(self) -> str:
        return f"[{self._job + 1}/{len(self._costs)}] {self._label}"

    def _show(self, phase: str, always: bool = False) -> None:
        line = f"{self._head}: {phase}, {self.left}"
        self._bar.update(self._task, completed=self._done, description=line)
        now = self._clock()
        if not self.console.is_terminal and (always or now - self._spoke > SECONDS_BETWEEN_LINES):
            self._spoke = now
            self.console.print(line, soft_wrap=True)
