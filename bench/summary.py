"""From one cell's raw samples to its rows: medians, intervals, speed-ups, distance to the floor, faults in words."""

from __future__ import annotations

from statistics import median
from typing import Any

from bench import stats
from bench.contestants.contestant import STAGES
from bench.floor.peaks import Peak
from bench.floor.roofline import Costs, mfu, total_floor_ms
from bench.measure.clock import Sample
from bench.measure.rounds import Cell
from bench.results import CellRecord, Estimate, Row
from bench.workload import Workload
from engines.serving.quantiles import percentiles


def workload_record(workload: Workload) -> dict[str, Any]:
    return {
        "resolution": str(workload.resolution),
        "steps": workload.steps,
        "batch": workload.batch,
        "guidance_scale": workload.guidance_scale,
        "scheduler": workload.scheduler,
        "seed": workload.seed,
        "prompts": workload.batch_prompts(),
    }


UNEXPLAINED = "unexplained"
"""Stands beside the stages where they leave more than 1 % of the total to it."""


def stage_medians(samples: list[Sample]) -> dict[str, float]:
    """The stages of the median call: each stage's share of its call, over all calls, times the median total. What the
    stages leave unexplained counts as one more stage, and is told where it is over the 1 % that is allowed.

    Medians of single stages need not add up to the median total; these do, within that 1 %.
    """
    total = median(sample.total_ms for sample in samples)
    names = list(dict.fromkeys([*STAGES, *(name for sample in samples for name in sample.stages_ms)]))
    shares = {name: median(sample.stages_ms.get(name, 0.0) / sample.total_ms for sample in samples) for name in names}
    shares[UNEXPLAINED] = median(1 - sum(sample.stages_ms.values()) / sample.total_ms for sample in samples)
    whole = sum(shares.values())
    if abs(shares[UNEXPLAINED]) <= stats.SUM_WITHIN * whole:
        del shares[UNEXPLAINED]
    return {name: total * share / whole for name, share in shares.items()}


def speedup(baseline: list[Sample], other: list[Sample]) -> Estimate | None:
    """How many times faster `other` is, round by round. None without a round that both finished."""
    before, after = ({sample.round: sample.total_ms for sample in samples} for samples in (baseline, other))
    rounds = [number for number in after if number in before]
    if not rounds:
        return None
    return stats.ratio_interval([before[one] for one in rounds], [after[one] for one in rounds])


def figures(samples: list[Sample], batch: int) -> dict[str, Any]:
    """What of a row follows from its samples alone; a file is held against the same when it is read."""
    totals = [sample.total_ms for sample in samples]
    total = stats.median_interval(totals)
    return {
        "total_ms": total,
        "stages_ms": stage_medians(samples),
        "step_ms": median(median(sample.steps_ms) for sample in samples),
        "images_per_s": 1e3 * batch / total.value,
        "cv": stats.spread(totals),
        "percentiles_ms": percentiles(totals),
    }


def make_row(
    name: str,
    samples: list[Sample],
    baseline: list[Sample],
    workload: Workload,
    *,
    warmups: int,
    first_ms: list[float],
    costs: Costs | None,
    peak: Peak | None,
    faults: dict[str, Any],
) -> Row:
    """`faults` holds what the machine and the pictures showed: see `stats.diagnose`."""
    found = figures(samples, workload.batch)
    queues = [sample.queue_ms for sample in samples if sample.queue_ms is not None]
    if costs:  # a scheduler of higher order calls the UNet more often than it has steps
        costs = costs | {"unet": (len(samples[0].steps_ms), costs["unet"][1])}
    floor_ms = total_floor_ms(costs, peak.tflops, peak.terabytes_per_s) if costs and peak else None
    diagnosis = stats.diagnose(
        [sample.total_ms for sample in samples],
        unaccounted=max(sample.unaccounted for sample in samples),
        queue_ms=median(queues) if queues else None,
        step_ms=found["step_ms"],
        floor_ms=floor_ms,
        **faults,
    )
    refused = stats.is_refused(diagnosis)
    return Row(
        contestant=name,
        **found,
        speedup=None if refused else speedup(baseline, samples),
        floor_ms=floor_ms,
        mfu=mfu(costs, found["total_ms"].value, peak.tflops) if costs and peak else None,
        diagnosis=diagnosis,
        refused=refused,
        warmups=warmups,
        unsettled=faults.get("unsettled"),
        first_ms=first_ms,
        samples=samples,
    )


def summarise(
    cell: Cell,
    baseline: str,
    *,
    costs: dict[str, Costs | None],
    peak: Peak | None,
    faults: dict[str, Any],
) -> CellRecord:
    """Nothing is held against a baseline that was refused."""
    reference = cell.samples.get(baseline, [])
    rows = [
        make_row(
            name,
            samples,
            reference,
            cell.workload,
            warmups=cell.warmups[name],
            first_ms=cell.first_ms[name],
            costs=costs.get(name),
            peak=peak,
            faults=faults | {"unsettled": cell.unsettled.get(name), "pictures": cell.faults.get(name, [])},
        )
        for name, samples in cell.samples.items()
        if samples
    ]
    if any(row.refused for row in rows if row.contestant == baseline):
        rows = [row.model_copy(update={"speedup": None}) for row in rows]
    return CellRecord(
        workload=workload_record(cell.workload), name=cell.workload.name, rows=rows, failures=dict(cell.failures)
    )
