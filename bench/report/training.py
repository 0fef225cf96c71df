"""Training loops, from what `distill bench` writes: samples a second, memory, and against the published loop."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from bench.floor.peaks import find_peak
from bench.measure.stats import Estimate, median_interval
from bench.report.elements.formatting import milliseconds, percent, size, times, title_of
from bench.report.elements.tables import Cell, Column, Table, make_table, measured

LOOPS_SCHEMAS = ("slimxl.distill.bench/1", "slimxl.distill.bench/2")
PUBLISHED = "published"


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Loop(_Record):
    """One way to take a training step; `seconds` are of each timed step."""

    name: str
    seconds: list[float] = Field(min_length=1)
    peak_memory_bytes: int | None = None
    tflop: float | None = None
    kernels: dict[str, Any] | None = None

    @property
    def step_s(self) -> Estimate:
        return median_interval(self.seconds)


class LoopOptions(_Record):
    batch: int = Field(ge=1)
    mixed_precision: str


class LoopsFile(_Record):
    """What a report reads of such a file. Version 1 knows neither `tflop_per_step` nor `failures`, loop to reason."""

    schema_version: Literal["slimxl.distill.bench/1", "slimxl.distill.bench/2"]
    teacher: str
    student: str
    device: str
    resolution: str
    options: LoopOptions
    loops: list[Loop]
    tflop_per_step: float | None = None
    failures: dict[str, str] = {}

    @property
    def title(self) -> str:
        return f"{title_of(self.teacher)} → {title_of(self.student)}"

    @property
    def rounds(self) -> int:
        return max((len(loop.seconds) for loop in self.loops), default=0)


def loop_table(file: LoopsFile) -> Table:
    """One line for each loop that did not fail."""
    peak = find_peak(file.device)
    published = {loop.name: loop.seconds for loop in file.loops if loop.name.startswith(PUBLISHED)}

    def speed(loop: Loop) -> Cell:
        step = loop.step_s
        within = "" if step.low is None or step.high is None else _range(file, step.high, step.low)
        return measured(f"{file.options.batch / step.value:#.3g}", within)

    def mfu(loop: Loop) -> Cell | None:
        tflop = loop.tflop or file.tflop_per_step
        return (
            measured(percent(tflop / loop.step_s.value / peak.tflops_for(accumulates_fp32=True), 1))
            if peak and tflop
            else None
        )

    def gain(loop: Loop) -> Cell | None:
        before = published.get(f"{PUBLISHED} LCM" if loop.name == "LCM" else PUBLISHED)
        if before is None or loop.name in published:
            return None
        low, middle, high = np.quantile(np.asarray(before) / np.asarray(loop.seconds), [0.25, 0.5, 0.75])
        return measured(times(middle), f"quartiles {low:.2f}–{times(high)}")

    return make_table(
        file.loops,
        Column("loop", lambda loop: loop.name),
        Column("samples a second", speed),
        Column("step", lambda loop: measured(milliseconds(1e3 * loop.step_s.value))),
        Column("peak memory", lambda loop: measured(size(loop.peak_memory_bytes))),
        Column("MFU", mfu),
        Column("against the published one", gain),
    )


def _range(file: LoopsFile, slow_s: float, fast_s: float) -> str:
    return f"{file.options.batch / slow_s:#.3g}–{file.options.batch / fast_s:#.3g}"
