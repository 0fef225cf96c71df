"""A results file held against itself: every name is a contestant's, and every figure follows from its own samples.

Intervals and stages are worked out anew, so that files from before a change of their method compare with those after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isclose
from typing import Any

from bench.results import CellRecord, ContestantRecord, Estimate, Results, Row
from bench.summary import figures, speedup


def contradictions(results: Results) -> Iterator[str]:
    """In words, one by one. A speed-up may be absent where it could be told."""
    names = [one.name for one in results.contestants]
    named = [results.baseline, *(one.contestant for one in results.pictures)]
    for cell in results.cells:
        named += [*(row.contestant for row in cell.rows), *cell.failures]
    for name in dict.fromkeys(named):
        if names.count(name) != 1:
            yield f"{name!r} stands {names.count(name)} times among its contestants ({', '.join(names)}), not once"
    for record in results.contestants:
        yield from _wrong_energy(record)
    for cell in results.cells:
        for row in cell.rows:
            yield from _wrong_figures(cell, row, results.baseline)


def _wrong_energy(record: ContestantRecord) -> Iterator[str]:
    energy = record.energy
    if energy["j_per_image"] is not None:
        found = energy["mean_power_w"] * energy["seconds"] / energy["images"]
        if not _agree(energy["j_per_image"], found):
            yield f"j_per_image of {record.name} is {energy['j_per_image']}, and by its own power, time and images {found}"


def _wrong_figures(cell: CellRecord, row: Row, baseline: str) -> Iterator[str]:
    """Sets the intervals and the stages of `row` where its figures are right."""
    found = figures(row.samples, cell.workload["batch"])
    row.stages_ms = found.pop("stages_ms")
    if row.speedup is not None:
        base = next((one for one in cell.rows if one.contestant == baseline), None)
        found["speedup"] = speedup(base.samples, row.samples) if base else None
    for name, value in found.items():
        told = getattr(row, name)
        if not _agree(told, value):
            yield (
                f"{name} of {row.contestant} at {cell.name} is {_plain(told)}, and by its own samples {_plain(value)}"
            )
    row.total_ms, row.speedup = found["total_ms"], found.get("speedup")


def _plain(figure: Any) -> Any:
    """An estimate without its interval."""
    return figure.value if isinstance(figure, Estimate) else figure


def _agree(told: Any, found: Any) -> bool:
    told, found = _plain(told), _plain(found)
    if isinstance(found, dict):
        return set(told) == set(found) and all(_agree(told[key], found[key]) for key in found)
    if told is None or found is None:
        return told is found
    return isclose(told, found, rel_tol=1e-6, abs_tol=1e-9)
