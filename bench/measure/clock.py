"""Stages timed by marks on one timeline, so that they sum to the total by construction and can be checked against it.

A contestant calls `mark("denoise")` when that stage ends; what passed since the last mark belongs to it. On a GPU
each mark records an event in the current stream, so the stages lie on the device's own timeline; on a CPU a mark
reads the monotonic clock. In both cases an independent clock around the whole call gives the total.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any

from bench.contestants.contestant import STAGES, Contestant
from bench.contestants.pictures import Pictures
from bench.workload import Workload


@dataclass
class Sample:
    """One timed call. All times in milliseconds; `steps_ms` are the denoise stage's parts, in order.

    `queue_ms` is how far, at most, the device was behind the host during denoising: near 0 on a GPU means that the
    device waited for the host. None on a CPU.
    """

    total_ms: float
    stages_ms: dict[str, float]
    steps_ms: list[float]
    queue_ms: float | None = None
    started_s: float = 0.0
    round: int = 0

    @property
    def unaccounted(self) -> float:
        """Share of the total that the stages do not explain."""
        return abs(sum(self.stages_ms.values()) - self.total_ms) / self.total_ms


class CpuClock:
    """Marks on the monotonic clock."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, int]] = []

    def start(self) -> None:
        self._marks = []
        self._start = time.perf_counter_ns()

    def mark(self, stage: str) -> None:
        self._marks.append((stage, time.perf_counter_ns()))

    def finish(self) -> tuple[list[tuple[str, float]], float | None]:
        """((stage, milliseconds) in order, None)."""
        spans, last = [], self._start
        for stage, at in self._marks:
            spans.append((stage, (at - last) / 1e6))
            last = at
        return spans, None


class CudaClock:
    """Marks as CUDA events in the current stream, with the host's time beside each to see which one waits."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._pool: list[Any] = []

    def _event(self) -> Any:
        if self._used == len(self._pool):
            self._pool.append(self._torch.cuda.Event(enable_timing=True))
        event = self._pool[self._used]
        self._used += 1
        event.record()
        return event

    def start(self) -> None:
        self._torch.cuda.synchronize()
        self._used = 0
        self._marks: list[tuple[str, Any, int]] = []
        self._start = self._event()
        self._start_ns = time.perf_counter_ns()

    def mark(self, stage: str) -> None:
        self._marks.append((stage, self._event(), time.perf_counter_ns()))

    def finish(self) -> tuple[list[tuple[str, float]], float | None]:
        self._torch.cuda.synchronize()
        spans, last, queue_ms = [], self._start, 0.0
        for stage, event, host_ns in self._marks:
            spans.append((stage, last.elapsed_time(event)))
            last = event
            if stage == "denoise":
                queue_ms = max(queue_ms, self._start.elapsed_time(event) - (host_ns - self._start_ns) / 1e6)
        return spans, queue_ms


Clock = CpuClock | CudaClock


def make_clock(device: str) -> Clock:
    return CudaClock() if device.startswith("cuda") else CpuClock()


def timed_draw(contestant: Contestant, workload: Workload, clock: Clock) -> tuple[Sample, Pictures]:
    """One call under the clock, the collector held back so that it does not fall into one contestant's time."""
    asked, gc_was_on = contestant.asked(workload), gc.isenabled()
    gc.disable()
    try:
        clock.start()
        begin = time.perf_counter_ns()
        pictures = contestant.draw(asked, clock.mark)
        spans, queue_ms = clock.finish()
        total_ms = (time.perf_counter_ns() - begin) / 1e6
    finally:
        if gc_was_on:
            gc.enable()
    stages_ms = dict.fromkeys(STAGES, 0.0)
    for stage, milliseconds in spans:
        stages_ms[stage] = stages_ms.get(stage, 0.0) + milliseconds
    steps_ms = [milliseconds for stage, milliseconds in spans if stage == "denoise"]
    return Sample(total_ms, stages_ms, steps_ms, queue_ms), pictures
