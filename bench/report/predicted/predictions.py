"""Floors and predictions of every GPU of the list, and how far the method is from published and from measured figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from bench.floor.peaks import PEAKS
from bench.floor.predict import SQUARE, Check, Known, Prediction, predict, published_known
from bench.report.elements.formatting import by_size, long_seconds, percent, signed_percent, title_of
from bench.report.elements.tables import Cell, Column, Table, make_table, measured
from bench.report.runtimes import model_of
from bench.results import ContestantRecord, Results
from distill.models.conditioning import SD
from distill.models.families import FAMILIES
from engines.choices import EIGHT_BITS

STEPS = 30
RUNTIME = "TensorRT"
MEASURED = "measured by slimxl"

MODELS = ("sdxl", "ssd-1b", "vega")
"""Those of which figures are published, which the prediction of every model is made from."""
SD_MODELS = ("sd-1.5", "small-sd", "tiny-sd")


def predicted_models(results: Results) -> tuple[str, ...]:
    """The full-size models to predict beside a run: those of its own kind, SDXL's or SD 1.x's, and what else of the
    catalogue it drew with, as KOALA."""
    family = FAMILIES.get(results.family)
    usual = SD_MODELS if family and family.conditioning is SD else MODELS
    drawn = [model.name for model in map(model_of, results.contestants) if model and model.parameters]
    return tuple(dict.fromkeys((*usual, *drawn)))


Board = tuple[str, str]
"""A key of PEAKS, and the precision of the UNet."""


def measured_latencies(all_results: list[Results]) -> list[Known]:
    """What was measured with guidance on a GPU of the catalogue, of models of the catalogue, the baseline first.

    Rows that were refused or failed the quality guard take no part; of runs that measured the same the first stands.
    The floor is the row's own, which counts the UNet calls that were made: some schedulers make more than they have
    steps.
    """
    known: dict[tuple[Any, ...], Known] = {}
    for results in all_results:
        gpu = next((key for key, peak in PEAKS.items() if results.peak and peak.name == results.peak.name), None)
        if gpu is None:
            continue
        for cell in results.cells:
            load = cell.workload
            for row in sorted(cell.rows, key=lambda row: row.contestant != results.baseline):
                record = results.contestant(row.contestant)
                model, runtime = model_of(record), runtime_class(record)
                sound = not (row.refused or record.failed_guard)
                if row.floor_ms is None or not sound or load["guidance_scale"] <= 1 or record.taught:
                    continue
                if model is None or model.parameters is None:  # a mini model, or none of the catalogue
                    continue
                one = Known(gpu, model.name, load["steps"], runtime, row.total_ms.value, row.floor_ms, MEASURED)
                precision = record.precision if record.is_in_8_bits else "fp16"
                one = replace(one, resolution=load["resolution"], batch=load["batch"], precision=precision)
                known.setdefault((gpu, model.name, runtime, one.steps, one.resolution, one.batch), one)
    return list(known.values())


def known_latencies(measured: list[Known]) -> list[Known]:
    """Published figures, and those measured at the size that predictions are made for."""
    return published_known() + [one for one in measured if (one.resolution, one.batch) == (str(SQUARE), 1)]


def runtime_class(record: ContestantRecord) -> str:
    """The published figures' name for a runtime of ours; they are of fp16, so another precision is told with it."""
    classes = {"tensorrt-rtx": "TensorRT-RTX", "tensorrt": "TensorRT", "compile": "compiled", "eager": "diffusers"}
    name = next((title for part, title in classes.items() if part in record.runtime), record.runtime)
    return f"{name}, {record.precision}" if record.precision in ("bf16", "fp32", *EIGHT_BITS) else name


def all_predictions(known: list[Known], models: Sequence[str] = MODELS) -> dict[Board, list[Prediction]]:
    """Of every GPU of the list in fp16, and in 8 bits where the board has them and is told as one; one for each model."""
    found = {(gpu, "fp16"): [predict(gpu, model, STEPS, RUNTIME, known) for model in models] for gpu in PEAKS}
    for gpu, peak in PEAKS.items():
        for name in () if peak.floor_only else peak.eight_bits:
            runtime = f"{RUNTIME}, {name}"
            found[gpu, name] = [predict(gpu, model, STEPS, runtime, known, name) for model in models]
    return found


def calibration(known: list[Known]) -> str:
    """The share of its floor that TensorRT is known to reach, by GPU."""
    told = [f"{percent(one.efficiency)} on {PEAKS[one.gpu].name}" for one in known if one.runtime == RUNTIME]
    return ", ".join(told)


def about(predicted_ms: float) -> str:
    return f"≈ {long_seconds(predicted_ms)}"


def prediction_table(predictions: dict[Board, list[Prediction]], models: Sequence[str]) -> Table:
    def gpu(key: Board) -> Cell:
        peak, precision = PEAKS[key[0]], key[1]
        rate = f"{peak.tflops_in(precision):.0f} {'TOP/s' if precision == 'int8' else 'TFLOP/s'}"
        name = f"{peak.name}, {precision}" if precision in EIGHT_BITS else peak.name
        return Cell(name, small=(f"{rate}, {peak.terabytes_per_s:.2f} TB/s",))

    def column(index: int, model: str) -> Column[Board]:
        def write(key: Board) -> Cell:
            one = predictions[key][index]
            floor = f"floor {long_seconds(one.floor_ms)}"
            if one.total_ms is None:
                return Cell("–", "predicted", (floor,))
            within = f"{long_seconds(one.low_ms)[:-2]} – {long_seconds(one.high_ms)}" if one.low_ms else ""
            return Cell(about(one.total_ms), "predicted", (within, floor))

        return Column(title_of(model), write)

    return make_table(predictions, Column("GPU", gpu), *(column(*pair) for pair in enumerate(models)))


def published_table(checks: list[Check], sources: list[str]) -> Table:
    """`sources` are numbered from 1, as the notes below the table are."""

    def what(one: Check) -> Cell:
        known = one.known
        return Cell(PEAKS[known.gpu].name, small=(f"{title_of(known.model)}, {known.runtime}, {known.steps} steps",))

    def published(one: Check) -> Cell:
        source = f"source {sources.index(one.known.origin) + 1}"
        return Cell(long_seconds(one.known.total_ms), "published", (source,))

    def error(one: Check) -> Cell:
        blind = "" if one.blind_error is None else f"blind {signed_percent(one.blind_error)}"
        return Cell(signed_percent(one.error), "predicted", (blind,))

    return make_table(
        checks,
        Column("GPU, model, runtime", what),
        Column("published", published),
        Column("share of the floor", lambda one: percent(one.known.efficiency)),
        Column("predicted", lambda one: Cell(about(one.predicted_ms), "predicted")),
        Column("error", error),
    )


def measured_table(checks: list[Check]) -> Table:
    def what(one: Check) -> Cell:
        known = one.known
        workload = f"{by_size(known.resolution)}, batch {known.batch}, {known.steps} steps"
        return Cell(f"{title_of(known.model)}, {known.runtime}", small=(workload,))

    return make_table(
        checks,
        Column("model, runtime", what),
        Column("measured", lambda one: measured(long_seconds(one.known.total_ms))),
        Column("predicted", lambda one: Cell(about(one.predicted_ms), "predicted")),
        Column("error", lambda one: Cell(signed_percent(one.error), "predicted")),
    )


def error_sizes(errors: list[float]) -> dict[str, float]:
    """Median and worst, whatever the sign."""
    sizes = [abs(error) for error in errors] or [0.0]
    return {"median": median(sizes), "worst": max(sizes)}
