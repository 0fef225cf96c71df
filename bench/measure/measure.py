"""Stages timed by marks on one timeline, so that they sum to the total by construction and can be checked against it.

A contestant calls `mark("denoise")` when that stage ends; what passed since the last mark belongs to it. On a GPU
each mark records an event in the current stream, so the stages lie on the device's own timeline; on a CPU a mark
reads the monotonic clock. In both cases an independent clock around the whole call gives the total.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from bench.measure.pictures import Pictures
    from bench.measure.workload import Workload

STAGES = ("prepare", "tokenise", "text_encoders", "denoise", "vae_decode", "post_process")
STABLE_WITHIN = 0.05  # two calls of the warm-up
Mark = Callable[[str], None]


class Contestant(Protocol):
    """Anything that draws. `device` is `cpu` or `cuda`, `runtime` and `precision` are words for the report, and what is
    fetched or made goes below `workdir`. `load` is timed as the cold start and called once."""

    name: str
    device: str
    runtime: str
    precision: str
    workdir: Path

    def load(self) -> None: ...

    def draw(self, workload: Workload, mark: Mark) -> Pictures: ...


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
    gc_was_on = gc.isenabled()
    gc.disable()
    try:
        clock.start()
        begin = time.perf_counter_ns()
        pictures = contestant.draw(workload, clock.mark)
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


@dataclass
class ColdStart:
    """Milliseconds from nothing to the first picture: `load_ms` reads weights or plans, `first_image_ms` is the first
    call (lazy allocation, just-in-time compilation), apart from the steady state."""

    load_ms: float
    first_image_ms: float


def cold_start(contestant: Contestant, workload: Workload) -> ColdStart:
    begin = time.perf_counter_ns()
    contestant.load()
    clock = make_clock(contestant.device)
    loaded = time.perf_counter_ns()
    sample, _ = timed_draw(contestant, workload, clock)
    return ColdStart((loaded - begin) / 1e6, sample.total_ms)


@dataclass
class Rounds:
    """How much is measured. A cell ends after `max_rounds`, or after `min_rounds` once its share of time is used."""

    min_rounds: int = 3
    max_rounds: int = 20
    max_warmup: int = 3


@dataclass
class Cell:
    """The samples of one workload, per contestant, in rounds that were interleaved. `first_ms` is the very first call
    of each visit, which pays for the change to this workload's shapes; `unsettled` by how much of itself the last call
    of the first visit's warm-up differed from the one before (None after a single call); `faults` what is visibly wrong
    with the pictures."""

    workload: Workload
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    first_ms: dict[str, list[float]] = field(default_factory=dict)
    warmups: dict[str, int] = field(default_factory=dict)
    unsettled: dict[str, float | None] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def warm_up(contestant: Contestant, cell: Cell, clock: Clock, most: int) -> None:
    """Draws until two calls in a row agree within STABLE_WITHIN, `most` times at most, and looks at the last pictures."""
    name, apart = contestant.name, None
    totals: list[float] = []
    for _ in range(most):
        sample, pictures = timed_draw(contestant, cell.workload, clock)
        if totals:
            apart = abs(sample.total_ms - totals[-1]) / totals[-1]
        totals.append(sample.total_ms)
        if apart is not None and apart <= STABLE_WITHIN:
            break
    cell.warmups[name] = len(totals)
    cell.first_ms.setdefault(name, []).append(totals[0])
    cell.unsettled.setdefault(name, apart)
    cell.faults[name] = cell.faults.get(name) or pictures.faults()


def measure_rounds(
    contestants: list[Contestant],
    cell: Cell,
    rounds: Rounds,
    budget_s: float,
    *,
    on_round: Callable[[int], None] = lambda _: None,
) -> None:
    """Adds interleaved rounds A B C, C B A, B C A, A C B, ... to `cell`: a drift of the machine meets all contestants
    alike, and so does what the one before leaves behind.

    Warm-up counts towards `budget_s`. A contestant that raises is recorded with its error and left out from then on;
    the others go on.
    """
    begin, running = time.monotonic(), []
    for contestant in contestants:
        if contestant.name in cell.failures:
            continue
        clock = make_clock(contestant.device)
        try:
            warm_up(contestant, cell, clock, rounds.max_warmup)
        except Exception as error:
            cell.failures[contestant.name] = f"{type(error).__name__}: {error}"
            continue
        running.append((contestant, clock))
        cell.samples.setdefault(contestant.name, [])
    first = 1 + max((sample.round for samples in cell.samples.values() for sample in samples), default=-1)
    for index in range(first, first + rounds.max_rounds):
        if index >= first + rounds.min_rounds and time.monotonic() - begin > budget_s:
            break
        gc.collect()
        turn = index // 2 % max(1, len(running))
        for contestant, clock in (running[turn:] + running[:turn])[:: -1 if index % 2 else 1]:
            started_s = time.monotonic()
            try:
                sample, _ = timed_draw(contestant, cell.workload, clock)
            except Exception as error:
                cell.failures[contestant.name] = f"{type(error).__name__}: {error}"
                continue
            sample.started_s, sample.round = started_s, index
            cell.samples[contestant.name].append(sample)
        running = [entry for entry in running if entry[0].name not in cell.failures]
        on_round(index)


@contextmanager
def settled_heap() -> Iterator[None]:
    """What is loaded by now (millions of objects, with torch and diffusers) is looked through once, not by the collector
    of every round."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@settled_heap()
def measure_cells(
    contestants: list[Contestant],
    workloads: list[Workload],
    rounds: Rounds,
    seconds: float,
    *,
    on_round: Callable[[int], None] = lambda _: None,
    on_visit: Callable[[Cell, bool], None] = lambda _cell, _last: None,
) -> list[Cell]:
    """Every workload twice, there and back again, so that a drift of the machine does not look like an effect of size
    or steps. `rounds.min_rounds` and `max_rounds` are shared by both visits; the first workload gets a triple share of
    the time. Once half as much again as `seconds` has gone, every visit left, but to the first, is a single round.
    `on_visit(cell, last)` is called after each visit.
    """
    cells = [Cell(workload) for workload in workloads]
    twice = rounds.max_rounds > 1
    visits = [*cells, *reversed(cells)] if twice else cells
    if twice:
        rounds = replace(rounds, min_rounds=max(1, -(-rounds.min_rounds // 2)), max_rounds=rounds.max_rounds // 2)
    unit_s = seconds / (2 + len(cells)) / 2
    begin = time.monotonic()
    for index, cell in enumerate(visits):
        visit = rounds
        if index >= len(cells):  # the second visit finds everything allocated and compiled
            visit = replace(visit, max_warmup=1)
        if cell is not cells[0] and time.monotonic() - begin > 1.5 * seconds:  # far slower than asked for: the main
            # cell gets the rounds that an interval needs, the others what is left
            visit = replace(visit, min_rounds=1, max_warmup=1)
        measure_rounds(contestants, cell, visit, unit_s * (3 if cell is cells[0] else 1), on_round=on_round)
        on_visit(cell, index >= len(visits) - len(cells))
    return cells
