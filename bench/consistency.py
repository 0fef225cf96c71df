"""A results file held against itself: every name is a contestant's, and every figure follows from its own samples."""

from __future__ import annotations

from collections.abc import Iterator
from math import isclose

from bench.results import CellRecord, Estimate, Results, Row
from bench.stats import median_interval
from bench.summary import speedup


def contradictions(results: Results) -> Iterator[str]:
    """In words, one by one. A speed-up may be absent where it could be told."""
    names = [one.name for one in results.contestants]
    named = [results.baseline, *(one.contestant for one in results.pictures)]
    for cell in results.cells:
        named += [*(row.contestant for row in cell.rows), *cell.failures]
    for name in dict.fromkeys(named):
        if names.count(name) != 1:
            yield f"{name!r} stands {names.count(name)} times among its contestants ({', '.join(names)}), not once"
    for cell in results.cells:
        for row in cell.rows:
            yield from _wrong_figures(cell, row, results.baseline)


def _wrong_figures(cell: CellRecord, row: Row, baseline: str) -> Iterator[str]:
    median = median_interval([sample["total_ms"] for sample in row.samples])
    if not _agree(row.total_ms, median):
        yield f"the median of {row.contestant} at {cell.name} ({row.total_ms}) is not that of its samples ({median})"
    if row.speedup is None:
        return
    base = next((one for one in cell.rows if one.contestant == baseline), None)
    found = speedup(base.by_round, row.by_round) if base else None
    if found is None or not _agree(row.speedup, found):
        yield f"the speed-up of {row.contestant} at {cell.name} ({row.speedup}) is not that of its samples ({found})"


def _agree(one: Estimate, other: Estimate) -> bool:
    pairs = ((one.value, other.value), (one.low, other.low), (one.high, other.high))
    return all(a is b if a is None or b is None else isclose(a, b, rel_tol=1e-6) for a, b in pairs)
