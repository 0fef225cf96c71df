"""Contestants timed side by side: warm-up, interleaved rounds, every workload visited twice."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from bench.contestants.contestant import Contestant
from bench.measure.clock import Clock, Sample, make_clock, timed_draw
from bench.workload import Workload
from distill.common.errors import describe_error

STABLE_WITHIN = 0.05  # two calls of the warm-up


class DoNotFitError(Exception):
    """One ran out of memory while others were loaded beside it."""


def out_of_memory_beside(error: Exception, contestants: Sequence[Contestant]) -> bool:
    """Whether it is an error of too little memory, whoever reports it, that others may have caused."""
    return len(contestants) > 1 and (isinstance(error, MemoryError) or "out of memory" in str(error).lower())


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
    on_round: Callable[[Cell], None] = lambda _: None,
) -> None:
    """Adds interleaved rounds A B C, C B A, B C A, A C B, ... to `cell`: a drift of the machine meets all contestants
    alike, and so does what the one before leaves behind.

    Warm-up counts towards `budget_s`. A contestant that raises is recorded with its error and left out from then on;
    the others go on. Raises DoNotFitError where it ran out of memory beside others.
    """
    begin, running = time.monotonic(), []
    for contestant in contestants:
        if contestant.name in cell.failures:
            continue
        clock = make_clock(contestant.device)
        try:
            warm_up(contestant, cell, clock, rounds.max_warmup)
        except Exception as error:
            if out_of_memory_beside(error, contestants):
                raise DoNotFitError(f"{contestant.name} ran out of memory at {cell.workload.name}") from error
            cell.failures[contestant.name] = describe_error(error)
            continue
        running.append((contestant, clock))
        cell.samples.setdefault(contestant.name, [])
    seen = (sample.round for one, _ in running for sample in cell.samples[one.name])
    first = 1 + max(seen, default=-1)
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
                if out_of_memory_beside(error, contestants):
                    raise DoNotFitError(f"{contestant.name} ran out of memory at {cell.workload.name}") from error
                cell.failures[contestant.name] = describe_error(error)
                continue
            sample.started_s, sample.round = started_s, index
            cell.samples[contestant.name].append(sample)
        running = [entry for entry in running if entry[0].name not in cell.failures]
        on_round(cell)


@contextmanager
def frozen_heap() -> Iterator[None]:
    """What is loaded by now (millions of objects, with torch and diffusers) is looked through once, not by the collector
    of every round."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def measure_cells(
    contestants: list[Contestant],
    workloads: list[Workload],
    rounds: Rounds,
    seconds: float,
    *,
    on_round: Callable[[Cell], None] = lambda _: None,
    cells: Sequence[Cell] = (),
) -> Iterator[tuple[Cell, bool]]:
    """Every workload twice, there and back again, so that a drift of the machine does not look like an effect of size
    or steps. Yields (cell, whether it is done) after each visit. `cells` of other contestants take the samples, where
    given.

    `rounds.min_rounds` and `max_rounds` count both visits together; the first workload gets a triple share of the time.
    After 1.5 times `seconds` each remaining visit is a single round, except those to the first workload.
    """
    cells = list(cells) or [Cell(workload) for workload in workloads]
    twice = rounds.max_rounds > 1
    visits = [*cells, *reversed(cells)] if twice else cells
    if twice:
        rounds = replace(rounds, min_rounds=max(1, -(-rounds.min_rounds // 2)), max_rounds=rounds.max_rounds // 2)
    unit_s = seconds / (2 + len(cells)) / 2
    begin = time.monotonic()
    with frozen_heap():
        for index, cell in enumerate(visits):
            visit = rounds
            if index >= len(cells):  # the second visit finds everything allocated and compiled
                visit = replace(visit, max_warmup=1)
            if cell is not cells[0] and time.monotonic() - begin > 1.5 * seconds:  # far slower than asked for: the
                # main cell gets the rounds that an interval needs, the others what is left
                visit = replace(visit, min_rounds=1, max_warmup=1)
            measure_rounds(contestants, cell, visit, unit_s * (3 if cell is cells[0] else 1), on_round=on_round)
            yield cell, index >= len(visits) - len(cells)
