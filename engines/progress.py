"""Progress of a run of builds: a bar on a terminal, plain lines elsewhere, and the time left in both."""

from __future__ import annotations

import time

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

    def __init__(self, costs: list[float], console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._costs = costs
        self._job = -1
        self._fraction = 0.0
        self._started = time.monotonic()
        self._job_started = self._started
        self._spoke = self._started
        self._label = ""
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
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
    def _done(self) -> float:
        """Cost finished so far, the running job in part."""
        if self._job < 0:
            return 0.0
        cost = self._costs[self._job]
        spent = (time.monotonic() - self._job_started) * self._done_rate()
        # within a phase that reports no steps, time itself moves the job, but never to its end
        fraction = max(self._fraction, min(0.95, spent / cost))
        return sum(self._costs[: self._job]) + cost * fraction

    def _done_rate(self) -> float:
        """Cost units per second, from finished jobs; 1 until one is finished."""
        before = sum(self._costs[: self._job])
        return before / (self._job_started - self._started) if before and self._job_started > self._started else 1.0

    @property
    def left_seconds(self) -> float:
        """Estimated from the expected costs and the speed so far."""
        elapsed, done = time.monotonic() - self._started, self._done
        total = sum(self._costs)
        speed = done / elapsed if done and elapsed > 1 else 1.0
        return (total - done) / speed

    def start(self, label: str) -> None:
        self._job += 1
        self._fraction, self._label, self._job_started = 0.0, label, time.monotonic()
        self._show("started", always=True)

    def update(self, phase: str, fraction: float) -> None:
        self._fraction = max(self._fraction, min(fraction, 0.99))
        self._show(phase)

    def finish(self, summary: str) -> None:
        self._fraction = 1.0
        self.console.print(
            f"[{self._job + 1}/{len(self._costs)}] {self._label}: {summary}", markup=False, soft_wrap=True
        )

    def _show(self, phase: str, always: bool = False) -> None:
        left = f"about {duration(self.left_seconds)} left"
        if self._bar and self._task is not None:
            text = f"[{self._job + 1}/{len(self._costs)}] {self._label}: {phase}"
            self._bar.update(self._task, completed=self._done, description=text.replace("[", "\\["), left=left)
            return
        now = time.monotonic()
        if always or now - self._spoke > QUIET_SECONDS:
            self._spoke = now
            self.console.print(
                f"[{self._job + 1}/{len(self._costs)}] {self._label}: {phase}, {left}", markup=False, soft_wrap=True
            )
