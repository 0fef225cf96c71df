"""The results file: everything a report needs, raw samples included, under a schema with a version."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from bench import shapes
from distill.errors import UserError
from distill.files import read_json, write_json
from engines.load_file import LOAD_SCHEMA, LoadFile, read_load

SCHEMA = "slimxl.bench.results/1"
TRAINING_SCHEMA = "slimxl.bench.training/1"
ACCEPTANCE_SCHEMA = "slimxl.bench.acceptance/1"
SESSION_SCHEMA = "slimxl.bench.session/1"
LOOPS_SCHEMA = "slimxl.distill.bench/1"  # distill.bench.SCHEMA: a report needs none of what trains


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
    samples: list[dict[str, Any]]

    @property
    def by_round(self) -> dict[int, float]:
        """Each round's total."""
        return {sample["round"]: sample["total_ms"] for sample in self.samples}


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


ModelT = TypeVar("ModelT", bound=BaseModel)


def _keeping_to(schema: str, model: type[ModelT], value: Any, path: Path) -> ModelT:
    """Raises UserError with the first place where `value` does not."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} does not keep to {schema}: {where}: {first['msg']}; make it anew") from None


def read_results(path: Path) -> Results:
    """Raises UserError for a file that is absent, not JSON, of another schema, without a single run, or that contradicts
    itself."""
    from bench.consistency import contradictions

    value = read_json(path)
    found = value.get("schema_version") if isinstance(value, dict) else None
    if found != SCHEMA:
        raise UserError(
            f"{path} is no results file of this version: it says {found!r}, needed is {SCHEMA!r}; "
            "make it anew with python -m bench run"
        )
    results = _keeping_to(SCHEMA, Results, value, path)
    _keeping_to(SCHEMA, shapes.ResultsParts, value, path)
    if not any(cell.rows for cell in results.cells):
        raise UserError(f"{path} holds no finished run; python -m bench run makes one")
    for fault in contradictions(results):
        raise UserError(f"{path} contradicts itself: {fault}; make it anew with python -m bench run")
    return results


@dataclass
class Inputs:
    """What a report is made from: results, load tests, and the GPU suite's other files as they were written."""

    results: list[Results] = field(default_factory=list)
    training: list[dict[str, Any]] = field(default_factory=list)
    published_loops: list[dict[str, Any]] = field(default_factory=list)
    acceptance: list[dict[str, Any]] = field(default_factory=list)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    loads: list[LoadFile] = field(default_factory=list)


def read_inputs(paths: list[Path]) -> Inputs:
    """Each file by its schema. Raises UserError for a file of none of them, or that does not keep to its own."""
    inputs = Inputs()
    others: dict[str, tuple[list[dict[str, Any]], type[BaseModel]]] = {
        TRAINING_SCHEMA: (inputs.training, shapes.TrainingFile),
        LOOPS_SCHEMA: (inputs.published_loops, shapes.LoopsFile),
        ACCEPTANCE_SCHEMA: (inputs.acceptance, shapes.AcceptanceFile),
        SESSION_SCHEMA: (inputs.sessions, shapes.SessionFile),
    }
    for path in paths:
        value = read_json(path)
        schema = value.get("schema_version") if isinstance(value, dict) else None
        if schema == LOAD_SCHEMA:
            inputs.loads.append(read_load(path))
        elif schema in others:
            kept, shape = others[schema]
            _keeping_to(schema, shape, value, path)
            kept.append(value)
        else:
            inputs.results.append(read_results(path))
    return inputs
