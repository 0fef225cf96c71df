"""Stages timed by marks on one timeline, so that they sum to the total by construction and can be checked against it.

A contestant calls `mark("denoise")` when that stage ends; what passed since the last mark belongs to it. On a GPU
each mark records an event in the current stream, so the stages lie on the device's own timeline; on a CPU a mark
reads the monotonic clock. In both cases an independent clock around the whole call gives the total.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.contestants.contestant import STAGES, Contestant
from bench.contestants.pictures import Pictures
from bench.workload import Workload


@dataclass
class Sample:
    """One timed call. All times in milliseconds; `steps_ms` are the denoise stage's parts, in order.

    `enqueue_bound` is the share of the denoise stage in which the device waited for the host, None on a CPU; `throttled`
    says why the GPU ran slower than it could during this call; `launch` counts processes from 0, `round` rounds within
    one.
    """

    total_ms: float
    stages_ms: dict[str, float]
    steps_ms: list[float]
    enqueue_bound: float | None = None
    started_s: float = 0.0
    round: int = 0
    launch: int = 0
    throttled: list[str] = field(default_factory=list)

    @property
    def unaccounted(self) -> float:
        """Share of the total that the stages do not explain."""
        return abs(sum(self.stages_ms.values()) - self.total_ms) / self.total_ms


BEHIND_SHARE = 0.05  # of a step: a device that is less behind the host at its end has waited for it


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
        """((stage, milliseconds) in order, share of denoising that the device waited for the host: None)."""
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
        spans, last, behind_ms = [], self._start, []
        for stage, event, host_ns in self._marks:
            spans.append((stage, last.elapsed_time(event)))
            last = event
            behind_ms.append(self._start.elapsed_time(event) - (host_ns - self._start_ns) / 1e6)
        return spans, enqueue_bound(spans, behind_ms)


def enqueue_bound(spans: Sequence[tuple[str, float]], behind_ms: Sequence[float]) -> float:
    """Share of the denoise stage spent in steps at whose end the device was hardly behind the host: it had done all that
    was launched, so the host set the pace. `behind_ms` is the device's time less the host's at the end of each span."""
    steps = [(taken, behind) for (stage, taken), behind in zip(spans, behind_ms, strict=True) if stage == "denoise"]
    waited = sum(taken for taken, behind in steps if behind < BEHIND_SHARE * taken)
    return waited / max(sum(taken for taken, _ in steps), 1e-9)


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
        spans, waited = clock.finish()
        total_ms = (time.perf_counter_ns() - begin) / 1e6
    finally:
        if gc_was_on:
            gc.enable()
    stages_ms = dict.fromkeys(STAGES, 0.0)
    for stage, milliseconds in spans:
        stages_ms[stage] = stages_ms.get(stage, 0.0) + milliseconds
    steps_ms = [milliseconds for stage, milliseconds in spans if stage == "denoise"]
    return Sample(total_ms, stages_ms, steps_ms, waited), pictures
