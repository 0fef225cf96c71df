"""Where the time of a call goes, and how it changes with the workload: bars, tables and charts of the main run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from markupsafe import Markup

from bench.contestants.contestant import STAGES
from bench.measure.stats import Estimate
from bench.report.cards import Card, drawn
from bench.report.elements.charts import Axis, Series, line_chart
from bench.report.elements.formatting import NONE, interval, milliseconds, percent, stage_name, times
from bench.report.elements.tables import Cell, Column, Table, make_table, measured
from bench.report.quality import Measure, right_counts, share_right
from bench.results import CellRecord, Results, Row

StageLine = tuple[Cell | str, Callable[[Row], Cell | str | None]]


def total_cell(row: Row, *small: str) -> Cell:
    """The median, struck through where the row is refused."""
    return measured(milliseconds(row.total_ms.value), *small, refused=row.refused)


def speedup_cell(speedup: Estimate | None) -> Cell | None:
    return measured(times(speedup.value), interval(speedup, "x")) if speedup else None


def stage_names(results: Results) -> list[str]:
    return sorted({stage for row in results.cells[0].rows for stage in row.stages_ms}, key=_stage_order)


def _stage_order(stage: str) -> int:
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def stage_bars(results: Results, cards: list[Card]) -> list[dict[str, Any]]:
    """[{"card", "stages": [{"stage", "ms", "share" of the total, "width" in % of the longest total}]}]"""
    longest = max((row.total_ms.value for row in results.cells[0].rows), default=1.0)
    bars = []
    for card in cards:
        if card.row is not None:
            total, told = card.row.total_ms.value, card.row.stages_ms
            stages = [
                {"stage": stage, "ms": told[stage], "share": told[stage] / total}
                | {"width": max(0, 100 * told[stage] / longest)}
                for stage in sorted(told, key=_stage_order)
            ]
            bars.append({"card": card, "stages": stages})
    return bars


def stage_table(results: Results, cards: list[Card]) -> Table:
    """A line for each stage and each figure of a call, a column for each contestant that finished one."""

    def stage_line(stage: str) -> StageLine:
        return stage_name(stage), lambda row: measured(milliseconds(row.stages_ms.get(stage)))

    def percentile_line(name: str) -> StageLine:
        return name, lambda row: milliseconds(row.percentiles_ms[name])

    lines: list[StageLine] = [
        *map(stage_line, stage_names(results)),
        ("one denoising step", lambda row: measured(milliseconds(row.step_ms))),
        (Cell("total", "measured"), lambda row: total_cell(row, interval(row.total_ms))),
        ("speed-up", lambda row: "baseline" if row.contestant == results.baseline else speedup_cell(row.speedup)),
        ("runs, spread", lambda row: f"{len(row.samples)}, {percent(row.cv, 1)}"),
        *map(percentile_line, ("p90", "p99")),
        ("use of the peak (MFU)", lambda row: percent(row.mfu, 1)),
    ]

    def column(card: Card, row: Row) -> Column[StageLine]:
        return Column(card.head, lambda line: line[1](row))

    return make_table(
        lines, Column("stage", lambda line: line[0]), *(column(card, card.row) for card in cards if card.row)
    )


def workload_table(results: Results, cards: list[Card]) -> Table:
    """The main workload by its name, each other by what sets it apart."""
    main = results.cells[0].name.split(", ")

    def column(card: Card) -> Column[CellRecord]:
        def write(cell: CellRecord) -> Cell:
            row, failure = cell.row(card.name), cell.failures.get(card.name, "")
            if row is None:
                return Cell("failed" if failure else NONE, hint=failure)
            gain = "" if row.speedup is None or card.is_baseline else times(row.speedup.value)
            if gain and row.speedup and row.speedup.low is not None:
                gain += f" ({interval(row.speedup, 'x')})"
            mfu = "" if row.mfu is None else f"MFU {percent(row.mfu, 1)}"
            return total_cell(row, interval(row.total_ms), gain, mfu, "then failed" if failure else "")

        return Column(card.head, write)

    def name(cell: CellRecord) -> str:
        return ", ".join(part for part in cell.name.split(", ") if part not in main) or cell.name

    return make_table(results.cells, Column("workload", name), *map(column, cards))


def quality_charts(results: Results, cards: list[Card], judged: list[Measure]) -> list[tuple[str, Markup]]:
    """(what was judged, quality against latency) for each measure that knows two contestants or more; what was judged with
    every number of steps is a line through them."""
    counts = right_counts(results)
    charts = []
    for measure in judged:
        series = []
        for card in cards:
            points, labels = [], []
            own = card.record.taught.get("steps")
            cells = (
                results.cells[:1] if own else sorted(varied(results, "steps"), key=lambda one: one.workload["steps"])
            )
            for cell in cells:
                row, steps = cell.row(card.name), int(own or cell.workload["steps"])
                value = measure.values.get(card.name) if cell is results.cells[0] else None
                if measure.is_read and (card.name, steps) in counts:
                    value = share_right(*counts[card.name, steps])
                if row is not None and not row.refused and value is not None:
                    points.append((row.total_ms.value, *measure.plotted(value)))
                    labels.append(f"{steps}")
            series.append(Series(card.title, card.colour, points, labels=labels, failed=card.failed))
        if sum(bool(one.points) for one in series) > 1:
            x = Axis(f"ms for {drawn(results)}; beside the dots: steps", zero=True)
            charts.append((measure.name, line_chart(series, x, Axis(measure.axis), f"{measure.name} against latency")))
    return charts


def steps_chart(results: Results, cards: list[Card]) -> Markup:
    cells = sorted(varied(results, "steps"), key=lambda cell: cell.workload["steps"])
    if len(cells) < 2:
        return Markup("")
    told = [card for card in cards if "steps" not in card.record.taught]
    series = _latency_series(told, cells, lambda cell: float(cell.workload["steps"]))
    for card in cards:
        if card not in told:  # drawn alike whatever was asked for: one point
            series += _latency_series([card], results.cells[:1], partial(_own_steps, card))
    return line_chart(
        series,
        Axis("denoising steps", ticks=[(cell.workload["steps"], str(cell.workload["steps"])) for cell in cells]),
        Axis(f"ms for {drawn(results)}", zero=True),
        "latency against steps",
    )


def _own_steps(card: Card, _cell: CellRecord) -> float:
    return card.record.taught["steps"]


def resolution_chart(results: Results, cards: list[Card]) -> Markup:
    def kilopixels(cell: CellRecord) -> float:
        width, height = cell.workload["resolution"].split("x")
        return int(width) * int(height) / 1e3

    cells = sorted(varied(results, "resolution"), key=kilopixels)
    if len(cells) < 2:
        return Markup("")
    series = _latency_series(cards, cells, kilopixels)
    return line_chart(
        [replace(one, line=False, shift=4.0 * (index - (len(series) - 1) / 2)) for index, one in enumerate(series)],
        Axis("thousand pixels"),
        Axis(f"ms for {drawn(results)}", zero=True),
        "latency against picture size",
    )


TRACED = {"sm_clock_mhz": "SM clock, MHz", "temperature_c": "temperature, °C", "power_w": "power, W"}
MAX_POINTS = 240  # a curve on a page needs no more


def sustained_charts(results: Results, cards: list[Card]) -> list[tuple[str, Markup]]:
    """(what, over time) of those that drew without a pause: a call's time, and what the GPU showed meanwhile."""
    traces = [(card, card.record.sustained) for card in cards if card.record.sustained]
    shown: dict[str, list[tuple[Card, Sequence[Any], Sequence[Any]]]] = {}
    shown[f"ms for {drawn(results)}"] = [(card, one.at_s, one.total_ms) for card, one in traces]
    for key, name in TRACED.items():
        shown[name] = [(card, one.gpu["at_s"], one.gpu[key]) for card, one in traces if key in one.gpu]
    charts = []
    for name, curves in shown.items():
        series = [_curve(card, at_s, values) for card, at_s, values in curves]
        if chart := line_chart(series, Axis("seconds"), Axis(name), f"{name} over time"):
            charts.append((name, chart))
    return charts


def _curve(card: Card, at_s: Sequence[Any], values: Sequence[Any]) -> Series:
    """Thinned to MAX_POINTS; readings that are absent are left out."""
    points: list[tuple[float, ...]] = [pair for pair in zip(at_s, values, strict=True) if None not in pair]
    return Series(card.title, card.colour, points[:: 1 + len(points) // MAX_POINTS], dots=False, failed=card.failed)


def varied(results: Results, key: str) -> list[CellRecord]:
    """The cells that differ from the main one in `key` alone, the main one among them."""
    main = results.cells[0].workload
    same = [other for other in ("resolution", "steps", "batch", "guidance_scale", "scheduler") if other != key]
    return [cell for cell in results.cells if all(cell.workload[other] == main[other] for other in same)]


def _latency_series(cards: list[Card], cells: list[CellRecord], x: Callable[[CellRecord], float]) -> list[Series]:
    series = []
    for card in cards:
        points: list[tuple[float, ...]] = []
        for cell in cells:
            row = cell.row(card.name)
            if row is not None and not row.refused:
                total = row.total_ms
                bounds = (total.low, total.high) if total.low is not None and total.high is not None else ()
                points.append((x(cell), total.value, *bounds))
        series.append(Series(card.title, card.colour, points, failed=card.failed))
    return series
