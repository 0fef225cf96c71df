"""A results file held against itself: every name is a contestant's, and every figure follows from its own samples.

Intervals are worked out anew, so that files from before a change of their method compare with those after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isclose

from bench.results import CellRecord, Results, Row
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
    """Sets the intervals of `row` where its figures are right."""
    median = median_interval([sample["total_ms"] for sample in row.samples])
    if not isclose(row.total_ms.value, median.value, rel_tol=1e-6):
        yield (
            f"the median of {row.contestant} at {cell.name} ({row.total_ms.value} ms) is not that of its samples "
            f"({median.value} ms)"
        )
    row.total_ms = median
    if row.speedup is None:
        return
    base = next((one for one in cell.rows if one.contestant == baseline), None)
    found = speedup(base.by_round, row.by_round) if base else None
    if found is None or not isclose(row.speedup.value, found.value, rel_tol=1e-6):
        told = found.value if found else "none"
        yield f"the speed-up of {row.contestant} at {cell.name} ({row.speedup.value}) is not that of its samples ({told})"
    row.speedup = found
