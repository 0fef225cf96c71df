"""What each runtime makes of the same model, what a smaller model gains on it, and what a change of size costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from bench.floor.roofline import ModelConfigs, component_costs, total_flops
from bench.measure.stats import Estimate, speedup
from bench.report.cards import contestant_cell
from bench.report.elements.formatting import (
    by_size,
    interval,
    joules,
    milliseconds,
    percent,
    seconds,
    size,
    times,
    title_of,
)
from bench.report.elements.tables import Cell, Column, Table, make_table, measured
from bench.report.latency import speedup_cell, total_cell
from bench.report.quality import quality_verdict
from bench.results import CellRecord, ContestantRecord, Results, Row
from bench.workload import Workload
from distill.models.architectures import ARCHITECTURES, CLAIMED_SPEEDUPS, Architecture, whole
from distill.models.resolution import Resolution


def model_of(record: ContestantRecord) -> Architecture | None:
    """The architecture of published size with as many UNet parameters."""
    known = (one for one in ARCHITECTURES.values() if one.parameters and one.parameters[0] == record.parameters)
    return next(known, None)


def _model_title(record: ContestantRecord) -> str:
    """The model's own, where it is a known one: contestants of one model have names of their own."""
    model = model_of(record)
    return model.title if model and model.title else title_of(record.name)


def _claim(smaller: ContestantRecord, base: ContestantRecord) -> float | None:
    """The speed-up that the makers of `smaller` claim, where `base` is what they claim it against."""
    model = model_of(smaller)
    return CLAIMED_SPEEDUPS.get(model.name) if model and model_of(base) == whole(model.family) else None


def _gain(baseline: Row, other: Row) -> Estimate | None:
    """How many times faster `other` is; None where one was refused."""
    return None if baseline.refused or other.refused else speedup(baseline.samples, other.samples)


def quotient(one: Estimate, other: Estimate) -> Estimate:
    """Of two speed-ups over a common third; its bounds are the widest that both intervals allow."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return Estimate(value=one.value / other.value)
    return Estimate(value=one.value / other.value, low=one.low / other.high, high=one.high / other.low)


def _known_models(results: Results, cell: CellRecord) -> list[tuple[ContestantRecord, Row]]:
    """The rows of one cell whose model is known by its UNet's parameters, and that drew what the cell says."""
    pairs = [(results.contestant(row.contestant), row) for row in cell.rows]
    return [(record, row) for record, row in pairs if record.parameters and record.configs and not record.taught]


def _kind(record: ContestantRecord) -> str:
    return record.spec.partition(":")[0].partition("@")[0]


@dataclass(kw_only=True)
class RuntimeFigures:
    """One model on one runtime. `over_compiled` goes through eager, which ran in the same rounds as either."""

    record: ContestantRecord
    row: Row
    over_eager: Estimate | None
    denoise_mfu: float | None
    over_compiled: Estimate | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "contestant": self.record.name,
            "runtime": self.record.runtime,
            "precision": self.record.precision,
            "total_ms": self.row.total_ms,
            "mfu": self.row.mfu,
            "denoise_mfu": self.denoise_mfu,
            "over_eager": self.over_eager,
            "over_compiled": self.over_compiled,
        }


def runtime_figures(all_results: list[Results]) -> list[RuntimeFigures]:
    """One entry per model, runtime and precision at the main workload, largest model first; empty where no model ran on
    more than one runtime."""
    main = all_results[0].cells[0].name
    entries: dict[tuple[Any, ...], RuntimeFigures] = {}
    for results in all_results:
        pairs = _known_models(results, results.cells[0]) if results.cells[0].name == main else []
        eager = {record.parameters: row for record, row in pairs if _kind(record) == "eager"}
        for record, row in pairs:
            base = eager.get(record.parameters)
            over_eager = _gain(base, row) if base is not None and base is not row else None
            flops = record.costs["unet"]["flops"] if record.costs else None
            denoise_mfu = flops / row.step_ms / (row.peak_tflops * 1e9) if flops and row.peak_tflops else None
            one = RuntimeFigures(record=record, row=row, over_eager=over_eager, denoise_mfu=denoise_mfu)
            entries.setdefault((record.parameters, record.runtime, record.precision), one)
    compiled = {one.record.parameters: one.over_eager for one in entries.values() if _kind(one.record) == "compiled"}
    for one in entries.values():
        reference = compiled.get(one.record.parameters)
        if reference and one.over_eager and _kind(one.record) == "bundle":
            one.over_compiled = quotient(one.over_eager, reference)
    models = [parameters for parameters, _, _ in entries]
    rows = sorted(entries.values(), key=lambda one: (-(one.record.parameters or 0), one.row.total_ms.value))
    return rows if len(set(models)) < len(models) else []


def runtime_table(figures: list[RuntimeFigures]) -> Table:
    return make_table(
        figures,
        Column("contestant", lambda one: contestant_cell(one.record, precise=True)),
        Column("median", lambda one: total_cell(one.row, interval(one.row.total_ms))),
        Column("against eager", lambda one: speedup_cell(one.over_eager)),
        Column("against torch.compile", lambda one: speedup_cell(one.over_compiled)),
        Column("MFU", lambda one: measured(percent(one.row.mfu, 1))),
        Column("MFU, denoising", lambda one: measured(percent(one.denoise_mfu, 1))),
        Column("energy an image", lambda one: measured(joules(one.record.energy["j_per_image"]))),
    )


@dataclass(frozen=True, kw_only=True)
class ModelGain:
    """A smaller model against the largest on the same runtime, in the same rounds. `by_flops` is what arithmetic gives at
    equal efficiency (the ratio of FLOPs), `claim` the published speed-up over SDXL; `model` and `base_model` are their
    architectures; `failed` and `base_failed` say which of the two failed the quality guard."""

    title: str
    base: str
    model: str
    base_model: str
    runtime: str
    failed: bool
    base_failed: bool
    cell: str
    speedup: Estimate
    by_flops: float
    claim: float | None


def model_gains(all_results: list[Results]) -> list[ModelGain]:
    """One for each smaller model, runtime and workload, unless it has too few runs for an interval. Where several files
    measured the same, the one with the largest base model counts, then the first."""
    found: dict[tuple[Any, ...], tuple[int, ModelGain]] = {}
    for results in all_results:
        for cell in results.cells:
            for record, largest, gain in _model_gains_of(results, cell):
                key, base = (record.parameters, gain.runtime, cell.name), largest.parameters or 0
                if key not in found or base > found[key][0]:
                    found[key] = (base, gain)
    return [gain for _, gain in found.values()]


def _model_gains_of(
    results: Results, cell: CellRecord
) -> Iterator[tuple[ContestantRecord, ContestantRecord, ModelGain]]:
    """(smaller, largest, gain) of every runtime of one cell."""
    pairs = _known_models(results, cell)
    for runtime, precision in dict.fromkeys((one.runtime, one.precision) for one, _ in pairs):
        group = [pair for pair in pairs if (pair[0].runtime, pair[0].precision) == (runtime, precision)]
        largest, base = max(group, key=lambda pair: pair[0].parameters or 0)
        for record, row in group:
            speedup = _gain(base, row) if record.parameters != largest.parameters else None
            if speedup is None or speedup.low is None:
                continue
            yield (
                record,
                largest,
                ModelGain(
                    title=title_of(record.name),
                    base=title_of(largest.name),
                    model=_model_title(record),
                    base_model=_model_title(largest),
                    runtime=f"{runtime}, {precision}",
                    failed=record.failed_guard,
                    base_failed=largest.failed_guard,
                    cell=cell.name,
                    speedup=speedup,
                    by_flops=_flops(largest, cell) / _flops(record, cell),
                    claim=_claim(record, largest),
                ),
            )


def _flops(record: ContestantRecord, cell: CellRecord) -> float:
    """Of one call at the size and batch of this cell."""
    load = cell.workload
    workload = Workload(
        resolution=Resolution.parse(load["resolution"]),
        steps=load["steps"],
        batch=load["batch"],
        guidance_scale=load["guidance_scale"],
    )
    return total_flops(component_costs(ModelConfigs(tuple((record.configs or {}).items())), workload))


def model_gain_table(found: list[ModelGain], main: str) -> Table:
    """At the main workload alone: a line for each smaller model, a column for each runtime."""
    told = [one for one in found if one.cell == main]
    models = {(one.model, one.base_model): one for one in reversed(told)}
    runtimes = dict.fromkeys(one.runtime for one in told)

    def column(runtime: str) -> Column[tuple[str, str]]:
        def write(pair: tuple[str, str]) -> Cell | None:
            of = (one for one in told if (one.model, one.base_model, one.runtime) == (*pair, runtime))
            one = next(of, None)
            cell = speedup_cell(one.speedup) if one else None
            return replace(cell, failed=one.failed or one.base_failed) if one and cell else cell

        return Column(runtime, write)

    return make_table(
        sorted(models),
        Column("model", lambda pair: Cell(pair[0], small=(f"against {pair[1]}",))),
        Column("by FLOPs", lambda pair: Cell(times(models[pair].by_flops), "predicted")),
        Column("claim", lambda pair: Cell(times(models[pair].claim), "published") if models[pair].claim else None),
        *map(column, runtimes),
    )


def layout_table(all_results: list[Results]) -> Table:
    """What layouts and CUDA graphs cost, from the first run whose contestants name one: cold start, memory, and for each
    size the median, the `first` picture at it and the first after coming `back` to it."""
    for results in all_results:
        named = [one for one in results.contestants if "+" in one.spec.partition(":")[0].replace("+taught", "")]
        cells = [cell for cell in results.cells if cell.workload["batch"] == results.cells[0].workload["batch"]]
        if named:
            return make_table(
                named,
                Column("contestant", contestant_cell),
                Column("load + first image", _cold_start),
                Column("memory added, device", lambda one: measured(size(one.memory["device_added_bytes"]))),
                *(_size_column(cell, cells) for cell in cells),
                Column("against torch in fp32", lambda one: quality_verdict(one).text, "wrap"),
            )
    return make_table(())


def _cold_start(record: ContestantRecord) -> Cell:
    return measured(seconds(record.cold["load_ms"] / 1e3), f"+ {milliseconds(record.cold['first_image_ms'])}")


def _size_column(cell: CellRecord, cells: list[CellRecord]) -> Column[ContestantRecord]:
    def write(record: ContestantRecord) -> Cell:
        row = cell.row(record.name)
        if row is None:
            return Cell("failed")
        small = []
        if cell is not cells[0] and row.first_ms:
            small.append(f"first {milliseconds(row.first_ms[0])}")
        if cell is not cells[-1] and len(row.first_ms) > 1:
            small.append(f"back {milliseconds(row.first_ms[1])}")
        return total_cell(row, *small)

    steps = f"{cell.workload['steps']} steps"
    return Column(Cell(by_size(cell.workload["resolution"]), small=(steps,)), write)
