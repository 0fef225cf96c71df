"""The results file: what was measured, raw samples included. Every figure is worked out from the samples when it is read.

The schema has a version. Files also show the figures beside the samples, for people and other programs; reading one
ignores them and works them out again, so a file cannot disagree with its own samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_serializer, model_validator
from pydantic.functional_serializers import SerializerFunctionWrapHandler

from bench.floor.peaks import Peak
from bench.floor.roofline import Costs, total_floor_ms, total_flops
from bench.measure.clock import Sample
from bench.measure.faults import eight_bit_faults, is_refused, machine_faults, picture_faults, sample_faults
from bench.measure.rounds import Cell
from bench.measure.stats import Estimate, median_interval, speedup, spread, stage_medians
from distill.common.errors import UserError
from distill.common.files import read_json, write_json
from distill.common.validation import first_fault
from engines.choices import EIGHT_BITS
from engines.serving.quantiles import percentiles

SCHEMA: Literal["slimxl.bench.results/2"] = "slimxl.bench.results/2"
ModelT = TypeVar("ModelT", bound=BaseModel)


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Row(Record):
    """One contestant at one workload. What was measured is stored, the properties are worked out from it.

    `first_ms` is the first call of each visit to this workload, coming from another's shapes; `unsettled` the share by
    which the last two calls of the warm-up differed; `flops` and `floor_ms` are of one call; `observed` are faults that
    the machine and the pictures showed, in words.
    """

    model_config = ConfigDict(extra="ignore")  # the figures in a file

    contestant: str
    samples: list[Sample] = Field(min_length=1)
    warmups: int
    unsettled: float | None = None
    first_ms: list[float] = []
    flops: float | None
    floor_ms: float | None
    observed: list[str]
    _batch: int = PrivateAttr(1)
    _baseline: list[Sample] = PrivateAttr(default_factory=list)
    _peak: Peak | None = PrivateAttr(None)
    _precision: str = PrivateAttr("")
    _in_half: list[Sample] = PrivateAttr(default_factory=list)

    @property
    def total_ms(self) -> Estimate:
        return median_interval([sample.total_ms for sample in self.samples])

    @property
    def stages_ms(self) -> dict[str, float]:
        return stage_medians(self.samples)

    @property
    def step_ms(self) -> float:
        return median(median(sample.steps_ms) for sample in self.samples)

    @property
    def images_per_s(self) -> float:
        return 1e3 * self._batch / self.total_ms.value

    @property
    def cv(self) -> float:
        return spread([sample.total_ms for sample in self.samples])

    @property
    def percentiles_ms(self) -> dict[str, float | None]:
        return percentiles([sample.total_ms for sample in self.samples])

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: the arithmetic done per second as a share of the peak, in 8 bits of that peak."""
        tflops = self._peak.tflops_in(self._precision) if self._peak else None
        if self.flops is None or tflops is None:
            return None
        return self.flops / (self.total_ms.value / 1e3) / (tflops * 1e12)

    @property
    def diagnosis(self) -> list[str]:
        """Every fault of the row: of the machine and the pictures, then of its samples."""
        found = sample_faults(self.samples, floor_ms=self.floor_ms, unsettled=self.unsettled)
        return self.observed + found + self.eight_bit_faults()

    def eight_bit_faults(self) -> list[str]:
        gain = speedup(self._in_half, self.samples) if self._in_half else None
        return eight_bit_faults(self._precision, gain)

    @property
    def refused(self) -> bool:
        return is_refused(self.diagnosis)

    @property
    def speedup(self) -> Estimate | None:
        """How many times faster than the baseline; None where either was refused."""
        return None if self.refused or not self._baseline else speedup(self._baseline, self.samples)

    @model_serializer(mode="wrap")
    def _with_figures(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return handler(self) | {name: getattr(self, name) for name in FIGURES}


FIGURES = tuple(name for name, value in vars(Row).items() if isinstance(value, property) and not name.startswith("_"))


class CellRecord(Record):
    """One workload; `failures` maps a contestant to the error that kept it from finishing, `device` a reading of the
    GPU to its [least, median, most] between the timed calls."""

    workload: dict[str, Any]
    name: str
    rows: list[Row]
    failures: dict[str, str]
    device: dict[str, list[float] | None] = {}

    def row(self, contestant: str) -> Row | None:
        return next((row for row in self.rows if row.contestant == contestant), None)


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
    def is_in_8_bits(self) -> bool:
        return self.precision in EIGHT_BITS

    def is_in_half(self, other: ContestantRecord) -> bool:
        """Whether `other`, in 8 bits, is this model on this runtime; a model is known by its size, else by its source."""

        def model(one: ContestantRecord) -> int | str:
            return one.parameters or one.spec.partition(":")[2]

        mine, its = ((one.runtime, model(one), one.is_in_8_bits) for one in (self, other))
        return mine[:2] == its[:2] and not mine[2] and its[2]

    @property
    def failed_guard(self) -> bool:
        return self.quality.get("passed") is False

    def artifact(self, kind: str) -> dict[str, Any] | None:
        """The first of its `checkpoint`, `onnx` or `bundle` folders."""
        return next((one for one in self.artifacts if one["kind"] == kind), None)


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
    """One run of the bench on one machine. The first cell is the main workload."""

    model_config = ConfigDict(validate_assignment=True)  # a run that adds cells as it goes gives their rows a baseline

    schema_version: Literal["slimxl.bench.results/2"] = SCHEMA
    created_utc: str
    command: str
    seconds: float
    baseline: str
    family: str
    environment: dict[str, Any]
    gpu: dict[str, Any]
    peak: Peak | None
    contestants: list[ContestantRecord]
    cells: list[CellRecord]
    pictures: list[PictureRecord]
    notes: list[str] = []

    @model_validator(mode="after")
    def _set_baselines(self) -> Results:
        records = {one.name: one for one in self.contestants}
        for cell in self.cells:
            base = cell.row(self.baseline)
            for row in cell.rows:
                row._batch, row._peak = cell.workload["batch"], self.peak
                row._baseline = base.samples if base is not None and not base.refused else []
                if record := records.get(row.contestant):
                    half = (cell.row(one.name) for one in self.contestants if one.is_in_half(record))
                    row._precision = record.precision
                    row._in_half = next((other.samples for other in half if other is not None), [])
        return self

    def contestant(self, name: str) -> ContestantRecord:
        return next(one for one in self.contestants if one.name == name)


def record_cell(
    cell: Cell,
    *,
    costs: dict[str, Costs | None],
    peak: Peak | None,
    faults: dict[str, Any],
    precisions: Mapping[str, str] | None = None,
) -> CellRecord:
    """What the file keeps of one measured workload. `costs` and `precisions` are by contestant; `faults` are the arguments
    of `machine_faults`."""
    rows = []
    for name, samples in cell.samples.items():
        if not samples:
            continue
        cost = costs.get(name)
        if cost:  # a scheduler of higher order calls the UNet more often than it has steps
            cost = cost | {"unet": (len(samples[0].steps_ms), cost["unet"][1])}
        row = Row(
            contestant=name,
            samples=samples,
            warmups=cell.warmups[name],
            unsettled=cell.unsettled.get(name),
            first_ms=cell.first_ms[name],
            flops=total_flops(cost) if cost else None,
            floor_ms=total_floor_ms(cost, peak, (precisions or {}).get(name, "fp16")) if cost and peak else None,
            observed=picture_faults(cell.faults.get(name, [])) + machine_faults(**faults),
        )
        rows.append(row)
    load = cell.workload
    workload = vars(load) | {"resolution": str(load.resolution), "prompts": load.batch_prompts()}
    return CellRecord(workload=workload, name=load.name, rows=rows, failures=dict(cell.failures))


def write_results(path: Path, results: Results) -> None:
    write_json(path, results.model_dump(mode="json"))


def read_results(path: Path) -> Results:
    """Raises UserError for a file that is absent, not JSON, of another schema, or without a single finished run."""
    value = read_json(path)
    found = value.get("schema_version") if isinstance(value, dict) else None
    if found != SCHEMA:
        raise UserError(
            f"{path} is no results file of this version: it says {found!r}, needed is {SCHEMA!r}; "
            "make it anew with python -m bench run"
        )
    results = parse_as(SCHEMA, Results, value, path)
    if not any(cell.rows for cell in results.cells):
        raise UserError(f"{path} holds no finished run; python -m bench run makes one")
    return results


def parse_as(schema: str, model: type[ModelT], value: Any, path: Path) -> ModelT:
    """`value`, read from `path`, as `model`, strictly typed. Raises UserError with the first place where it is not."""
    try:
        return model.model_validate_json(json.dumps(value, allow_nan=False), strict=True)
    except ValidationError as error:
        raise UserError(f"{path} does not keep to {schema}: {first_fault(error)}; make it anew") from None
    except ValueError:
        raise UserError(f"{path} does not keep to {schema}: NaN or infinity stands in it; make it anew") from None
