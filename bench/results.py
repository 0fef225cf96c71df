"""The results file: everything a report needs, raw samples included, under a schema with a version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from bench.measure.clock import Sample
from distill.common.files import write_json

SCHEMA = "slimxl.bench.results/1"
TRAINING_SCHEMA = "slimxl.bench.training/1"
ACCEPTANCE_SCHEMA = "slimxl.bench.acceptance/1"
SESSION_SCHEMA = "slimxl.bench.session/1"
LOOPS_SCHEMA = "slimxl.distill.bench/1"  # distill.studies.bench.SCHEMA: a report needs none of what trains


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Estimate(Record):
    """A value with its 95 % interval, None where the samples do not support one."""

    value: float
    low: float | None = None
    high: float | None = None

    def overlaps(self, other: Estimate) -> bool:
        """Whether the two intervals share a point; where one has none, nothing says that they do not."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return True
        return self.low <= other.high and other.low <= self.high


class Row(Record):
    """One contestant in one cell. Times in milliseconds; `speedup` is how many times faster than the baseline,
    `first_ms` the first call of each visit to this cell, from another workload's shapes, `unsettled` the share by which
    the last two calls of the warm-up differed."""

    contestant: str
    total_ms: Estimate
    stages_ms: dict[str, float]
    step_ms: float
    images_per_s: float
    cv: float
    percentiles_ms: dict[str, float | None]
    speedup: Estimate | None
    floor_ms: float | None
    mfu: float | None
    diagnosis: list[str]
    refused: bool
    warmups: int
    unsettled: float | None = None
    first_ms: list[float] = []
    samples: list[Sample]


class CellRecord(Record):
    """One workload; `failures` maps a contestant to the error that kept it from finishing, `device` a reading of the
    GPU to its [least, median, most] between the timed calls."""

    workload: dict[str, Any]
    name: str
    rows: list[Row]
    failures: dict[str, str]
    device: dict[str, list[float] | None] = {}


class ContestantRecord(Record):
    """`costs` maps a component to {calls, parameters, flops, bytes}; `cold` to load_ms and first_image_ms; `kernels` is
    what `kernels.profile_denoise` found; `engines` holds the sha256 of each engine of a bundle that was loaded."""

    name: str
    spec: str
    runtime: str
    precision: str
    device: str
    parameters: int | None
    costs: dict[str, dict[str, float]] | None
    costs_why: str | None
    cold: dict[str, float]
    memory: dict[str, Any]
    energy: dict[str, Any]
    kernels: dict[str, Any] | None = None
    quality: dict[str, Any]
    follows: dict[str, Any] | None
    artifacts: list[dict[str, Any]]
    configs: dict[str, str] | None = None
    engines: list[str] | None = None

    @property
    def failed_guard(self) -> bool:
        return self.quality.get("passed") is False


class PictureRecord(Record):
    contestant: str
    prompt: str
    seed: int
    resolution: str
    steps: int
    guidance_scale: float
    png_base64: str
    follows: dict[str, bool] | None


class Results(Record):
    """One run of the bench on one machine."""

    schema_version: str = SCHEMA
    created_utc: str
    command: str
    seconds: float
    baseline: str
    family: str
    environment: dict[str, Any]
    gpu: dict[str, Any]
    peak: dict[str, Any] | None
    contestants: list[ContestantRecord]
    cells: list[CellRecord]
    pictures: list[PictureRecord]
    notes: list[str] = []

    def contestant(self, name: str) -> ContestantRecord:
        return next(one for one in self.contestants if one.name == name)


def write_results(path: Path, results: Results) -> None:
    write_json(path, results.model_dump(mode="json"))
