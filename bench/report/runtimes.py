"""What each runtime makes of the same model, what a smaller model gains on it, and what a change of size costs."""

from __future__ import annotations

from typing import Any

from bench.floor.roofline import ModelConfigs, component_costs, total_flops
from bench.report import words
from bench.results import CellRecord, ContestantRecord, Estimate, Results, Row
from bench.summary import speedup
from bench.workload import Workload
from distill.models.architectures import ARCHITECTURES
from distill.models.resolution import Resolution

MODELS = ("sdxl", "ssd-1b", "vega")
CLAIMS = {"ssd-1b": 1.6, "vega": 2.0}
"""How many times as fast as SDXL their makers say they are: "up to 60 %" and "100 %" faster."""


def model_of(record: ContestantRecord) -> str | None:
    """The full-size architecture with as many UNet parameters."""
    published = {name: ARCHITECTURES[name].parameters for name in MODELS}
    return next((name for name, counts in published.items() if counts and record.parameters == counts[0]), None)


def _between(baseline: Row, other: Row) -> Estimate | None:
    """How many times faster `other` is; None where one was refused."""
    if baseline.refused or other.refused:
        return None
    return speedup(baseline.samples, other.samples)


def over(one: Estimate, other: Estimate) -> Estimate:
    """The quotient of two speed-ups over a common third; its bounds are the widest that both intervals allow."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return Estimate(value=one.value / other.value)
    return Estimate(value=one.value / other.value, low=one.low / other.high, high=one.high / other.low)


def _finished(results: Results, cell: CellRecord) -> list[tuple[ContestantRecord, Row]]:
    """The rows of one cell whose model is known by its UNet's parameters."""
    pairs = [(results.contestant(row.contestant), row) for row in cell.rows]
    return [(record, row) for record, row in pairs if record.parameters and record.configs]


def _kind(record: ContestantRecord) -> str:
    return record.spec.partition(":")[0].partition("@")[0]


def runtime_table(all_results: list[Results]) -> list[dict[str, Any]]:
    """One entry per model, runtime and precision at the main workload, largest model first; empty where no model ran on
    more than one runtime. `over_compiled` goes through eager, which ran in the same rounds as either."""
    main = all_results[0].cells[0].name
    entries: dict[tuple[Any, ...], dict[str, Any]] = {}
    for results in all_results:
        pairs = _finished(results, results.cells[0]) if results.cells[0].name == main else []
        eager = {record.parameters: row for record, row in pairs if _kind(record) == "eager"}
        for record, row in pairs:
            calls = record.costs["unet"] if record.costs else {}
            peak = results.peak["tflops"] * 1e9 if results.peak else None
            base = eager.get(record.parameters)
            entry = {
                "record": record,
                "row": row,
                "over_eager": _between(base, row) if base is not None and base is not row else None,
                "over_compiled": None,
                "denoise_mfu": calls["flops"] / row.step_ms / peak if peak else None,
            }
            entries.setdefault((record.parameters, record.runtime, record.precision), entry)
    compiled = {
        one["record"].parameters: one["over_eager"]
        for one in entries.values()
        if _kind(one["record"]) == "compiled" and one["over_eager"]
    }
    for one in entries.values():
        reference = compiled.get(one["record"].parameters)
        if reference and one["over_eager"] and _kind(one["record"]) == "bundle":
            one["over_compiled"] = over(one["over_eager"], reference)
    models = [key[0] for key in entries]
    rows = sorted(entries.values(), key=lambda one: (-one["record"].parameters, one["row"].total_ms.value))
    return rows if len(set(models)) < len(models) else []


def limit_table(all_results: list[Results]) -> list[dict[str, Any]]:
    """Each smaller model against the largest on the same runtime, in the same rounds: `speedup`, the `limit` that
    arithmetic sets at equal efficiency (the ratio of FLOPs), and the published `claim`, which is against SDXL; which of
    the two `failed` the quality guard. A speed-up of too few runs for an interval is left to the table by workload; of
    runs that measured the same the one against the largest model stands, and of those the first."""
    table: dict[tuple[Any, ...], tuple[int, dict[str, Any]]] = {}
    for results in all_results:
        for cell in results.cells:
            pairs = _finished(results, cell)
            for runtime, precision in dict.fromkeys((one.runtime, one.precision) for one, _ in pairs):
                group = [pair for pair in pairs if (pair[0].runtime, pair[0].precision) == (runtime, precision)]
                largest, base = max(group, key=lambda pair: pair[0].parameters or 0)
                for record, row in group:
                    found = _between(base, row) if record.parameters != largest.parameters else None
                    if found is not None and found.low is not None:
                        entry = {
                            "title": words.title_of(record.name),
                            "base": words.title_of(largest.name),
                            "runtime": f"{runtime}, {precision}",
                            "failed": record.failed_guard,
                            "base_failed": largest.failed_guard,
                            "cell": cell.name,
                            "speedup": found,
                            "limit": _flops(largest, cell) / _flops(record, cell),
                            "claim": CLAIMS.get(model_of(record) or "") if model_of(largest) == "sdxl" else None,
                        }
                        key, size = (record.parameters, runtime, precision, cell.name), largest.parameters or 0
                        if key not in table or size > table[key][0]:
                            table[key] = (size, entry)
    return [entry for _, entry in table.values()]


def _flops(record: ContestantRecord, cell: CellRecord) -> float:
    """Of one call at the size and batch of this cell."""
    load = cell.workload
    workload = Workload(
        resolution=Resolution.parse(load["resolution"]),
        steps=load["steps"],
        batch=load["batch"],
        guidance_scale=load["guidance_scale"],
    )
    return total_flops(component_costs(ModelConfigs(**(record.configs or {})), workload))


def shape_table(all_results: list[Results]) -> dict[str, Any] | None:
    """What layouts and CUDA graphs cost: cold start, memory, and for each size the median, the `first` picture at it
    and the first after coming `back` to it; None where no layout was named."""
    for results in all_results:
        named = [one for one in results.contestants if "+" in one.spec.partition(":")[0]]
        cells = [cell for cell in results.cells if cell.workload["batch"] == results.cells[0].workload["batch"]]
        if named:
            sizes = [cell.workload["resolution"] for cell in cells]
            rows = [
                {
                    "title": words.title_of(one.name),
                    "record": one,
                    "sizes": [_visits(one, cell, cells) for cell in cells],
                }
                for one in named
            ]
            return {"sizes": sizes, "rows": rows, "steps": cells[0].workload["steps"]}
    return None


def _visits(record: ContestantRecord, cell: CellRecord, cells: list[CellRecord]) -> dict[str, Any] | None:
    row = next((row for row in cell.rows if row.contestant == record.name), None)
    if row is None:
        return None
    first = row.first_ms[0] if cell is not cells[0] and row.first_ms else None
    back = row.first_ms[1] if cell is not cells[-1] and len(row.first_ms) > 1 else None
    return {"median": row.total_ms.value, "first": first, "back": back}
