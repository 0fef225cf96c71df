"""What `bench search` predicted of its students, beside what of them was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from bench.floor.roofline import ModelConfigs
from bench.measure.stats import Estimate
from bench.report.elements.charts import Axis, Series, line_chart
from bench.report.elements.formatting import interval, milliseconds, signed_percent, times
from bench.report.elements.tables import Cell, Column, Table, make_table, measured
from bench.report.latency import speedup_cell, total_cell
from bench.report.predicted.predictions import runtime_class
from bench.results import ContestantRecord, Results, Row
from bench.search.front import FoundStudent, FrontFile, work_of
from distill.models.depth import Depth
from distill.models.families import FAMILIES

WAYS = {"search": "proposal", "published": "published cut", "greedy": "way down", "one-shot": "single scores added up"}


@dataclass(frozen=True)
class Found:
    """A student of a search; `row` is the first contestant of its depth that was measured, on what it was predicted for."""

    student: FoundStudent
    row: Row | None = None
    speedup: Estimate | None = None

    @property
    def error(self) -> float | None:
        return self.student.latency_ms.value / self.row.total_ms.value - 1 if self.row else None

    def as_json(self) -> dict[str, Any]:
        told = {"contestant": self.row.contestant, "measured_ms": self.row.total_ms} if self.row else {}
        return self.student.model_dump() | told | {"error": self.error, "measured_speedup": self.speedup}


def found_students(front: FrontFile, all_results: list[Results]) -> list[Found]:
    """The proposals, the published students, and whatever else of the search was measured, each depth once."""
    rows: dict[str, tuple[Row, Estimate | None]] = {}
    for depth, row, speedup in _measured(front, all_results):
        rows.setdefault(depth, (row, speedup))
    found: dict[str, Found] = {}
    for way in WAYS:
        for one in front.students:
            if one.way == way and (way in ("search", "published") or one.depth in rows):
                found.setdefault(one.depth, Found(one, *rows.get(one.depth, ())))
    return sorted(found.values(), key=lambda one: one.student.latency_ms.value)


def _measured(front: FrontFile, all_results: list[Results]) -> Iterator[tuple[str, Row, Estimate | None]]:
    """(depth, row, speed-up over the searched teacher where that is the run's baseline) of sound rows."""
    for results in all_results:
        if results.peak is None or results.peak.name != front.gpu:
            continue
        depths = {one.name: depth_of(one, front.family) for one in results.contestants}
        for cell in results.cells:
            for row in cell.rows if work_of(cell.workload) == front.workload else ():
                record, depth = results.contestant(row.contestant), depths[row.contestant]
                fits = front.runtime in record.runtime or front.runtime == runtime_class(record)
                if depth and fits and not (row.refused or record.failed_guard or record.taught):
                    of_teacher = depths[results.baseline] == front.depth and row.contestant != results.baseline
                    yield depth, row, row.speedup if of_teacher else None


def depth_of(record: ContestantRecord, family: str) -> str | None:
    """The depth of a contestant's UNet as text; None where it is of another family, or not known."""
    configs = ModelConfigs(tuple((record.configs or {}).items()))
    unet = configs.parsed("unet") if record.configs and "unet" in record.configs else None
    known = FAMILIES.get(family)
    return str(Depth.from_config(unet)) if unet and known and known.fits(unet) else None


def found_table(found: list[Found]) -> Table:
    def name(one: Found) -> Cell:
        return Cell(one.student.name or one.student.depth, small=(WAYS[one.student.way], one.student.depth))

    def predicted_ms(one: Found) -> Cell:
        told = one.student.latency_ms
        return Cell(f"≈ {milliseconds(told.value)}", "predicted", (interval(Estimate(**told.model_dump())),))

    def predicted_times(one: Found) -> Cell:
        told = one.student.speedup
        return Cell(f"≈ {times(told.value)}", "predicted", (interval(Estimate(**told.model_dump()), "x"),))

    return make_table(
        found,
        Column("student", name),
        Column("change of noise_pred", lambda one: f"{one.student.change:.2g}"),
        Column("predicted", predicted_ms),
        Column("measured", lambda one: total_cell(one.row, interval(one.row.total_ms)) if one.row else None),
        Column("error", lambda one: None if one.error is None else Cell(signed_percent(one.error), "predicted")),
        Column("predicted speed-up", predicted_times),
        Column("measured speed-up", lambda one: speedup_cell(one.speedup) or measured("–")),
    )


def found_chart(found: list[Found]) -> Markup:
    """Measured against predicted latency, with the line on which both are the same; empty where nothing was measured."""
    points, labels = [], []
    for one in found:
        if one.row:
            total, predicted = one.row.total_ms, one.student.latency_ms.value
            points.append((predicted, total.value, *((total.low, total.high) if total.low is not None else ())))
            labels.append(one.student.name)
    if not points:
        return Markup("")
    ends = [min(min(point[:2]) for point in points), max(max(point[:2]) for point in points)]
    equal = Series("as predicted", 0, [(end, end) for end in ends], dots=False)
    series = [equal, Series("measured", 1, points, line=False, labels=labels)]
    return line_chart(series, Axis("ms predicted"), Axis("ms measured"), "measured latency against predicted")
