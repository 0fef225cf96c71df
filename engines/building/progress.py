"""Progress of a run of builds: a bar on a terminal, plain lines elsewhere, and the time left in both."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

QUIET_SECONDS = 10.0
"""How often a line is printed where there is no terminal."""


def duration(seconds: float) -> str:
    """`42 s` or `3 min 20 s`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


class BuildProgress:
    """Knows the expected cost of every job and what was really spent, and so what is left."""

    def __init__(
        self, costs: list[float], console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Console(highlight=False, markup=False)
        self._costs = costs
        self._clock = clock
        self._job = -1
        self._milestone = 0.0, 0.0  # fraction of the running job, and its seconds when the builder told it
        self._started = clock()
        self._job_started = self._started
        self._spoke = self._started
        self._label = ""
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[left]}"),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("", total=sum(costs), left="")

    def __enter__(self) -> BuildProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    @property
    def _fraction(self) -> float:
        """Of the running job. The builder's last milestone, and at its speed since; before the first, the time spent
        in proportion to the expected cost. Never the whole."""
        spent = self._clock() - self._job_started
        milestone, at = self._milestone
        guess = milestone * spent / at if milestone else spent / self._expected_seconds
        return min(guess, 0.99)

    @property
    def _expected_seconds(self) -> float:
        """Of the running job: its cost, in the seconds that finished jobs took for theirs."""
        before = sum(self._costs[: self._job])
        rate = (self._job_started - self._started) / before if before else 1.0
        return max(self._costs[self._job] * rate, 1e-3)

    @property
    def _done(self) -> float:
        """Cost finished so far, the running job in part."""
        return sum(self._costs[: self._job]) + self._costs[self._job] * self._fraction

    @property
    def left(self) -> str:
        """The time left in words, from the expected costs and the speed so far."""
        spent = self._clock() - self._job_started
        if not self._milestone[0] and spent > self._expected_seconds:
            return f"longer than the {duration(self._expected_seconds)} expected"
        elapsed, done = self._clock() - self._started, self._done
        speed = done / elapsed if done and elapsed > 1 else 1.0
        return f"about {duration((sum(self._costs) - done) / speed)} left"

    def start(self, label: str) -> None:
        self._job += 1
        self._milestone, self._label, self._job_started = (0.0, 0.0), label, self._clock()
        self._show("started", always=True)

    def update(self, phase: str, fraction: float) -> None:
        """`fraction` of the running job is done, as far as the builder tells."""
        if fraction > self._milestone[0]:
            self._milestone = fraction, self._clock() - self._job_started
        self._show(phase)

    def finish(self, summary: str) -> None:
        self.console.print(f"{self._head}: {summary}", soft_wrap=True)

    @property
    def _head(self) -> str:
        return f"[{self._job + 1}/{len(self._costs)}] {self._label}"

    def _show(self, phase: str, always: bool = False) -> None:
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self._done, description=f"{self._head}: {phase}", left=self.left)
            return
        now = self._clock()
        if always or now - self._spoke > QUIET_SECONDS:
            self._spoke = now
            self.console.print(f"{self._head}: {phase}, {self.left}", soft_wrap=True)
