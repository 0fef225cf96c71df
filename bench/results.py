"""The results file: what was measured, raw samples included. Every figure is worked out from the samples when it is read.

The schema has a version. Files also show the figures beside the samples, for people and other programs; reading one
ignores them and works them out again, so a file cannot disagree with its own samples.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.functional_serializers import SerializerFunctionWrapHandler

from bench.floor.peaks import Peak
from bench.floor.roofline import Costs, total_floor_ms, total_flops
from bench.measure.clock import Sample
from bench.measure.faults import eight_bit_faults, is_refused, machine_faults, picture_faults, sample_faults
from bench.measure.rounds import Cell
from bench.measure.stats import Estimate, by_launch, estimate_total, speedup, spread, stage_medians
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
    _paired: bool = PrivateAttr(True)
    _peak_tflops: float | None = PrivateAttr(None)
    _precision: str = PrivateAttr("")
    _in_half: list[Sample] = PrivateAttr(default_factory=list)

    @field_validator("samples")
    @classmethod
    def _took_time(cls, samples: list[Sample]) -> list[Sample]:
        for position, sample in enumerate(samples):
            if not sample.steps_ms or min(sample.total_ms, *sample.steps_ms) <= 0:
                raise ValueError(f"sample {position}: a call and its steps take more than 0 ms, and it has a step")
        return samples

    @property
    def total_ms(self) -> Estimate:
        """With the interval between launches, where there are several."""
        return estimate_total(self.samples)

    @property
    def launches(self) -> int:
        return len(by_launch(self.samples))

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
        """Model FLOPs utilisation: the arithmetic done per second as a share of `peak_tflops`."""
        if self.flops is None or self._peak_tflops is None:
            return None
        return self.flops / (self.total_ms.value / 1e3) / (self._peak_tflops * 1e12)

    @property
    def peak_tflops(self) -> float | None:
        """The machine's dense rate: of int8 or fp8 for a UNet in it, else of half precision in the accumulation that the
        contestant computes with."""
        return self._peak_tflops

    @property
    def diagnosis(self) -> list[str]:
        """Every fault of the row: of the machine and the pictures, then of its samples."""
        found = sample_faults(self.samples, floor_ms=self.floor_ms, unsettled=self.unsettled)
        return self.observed + found + self.eight_bit_faults()

    def eight_bit_faults(self) -> list[str]:
        gain = speedup(self._in_half, self.samples, paired=self._paired) if self._in_half else None
        return eight_bit_faults(self._precision, gain)

    @property
    def refused(self) -> bool:
        return is_refused(self.diagnosis)

    @property
    def speedup(self) -> Estimate | None:
        """How many times faster than the baseline; None where either was refused."""
        if self.refused or not self._baseline:
            return None
        return speedup(self._baseline, self.samples, paired=self._paired)

    @model_serializer(mode="wrap")
    def _with_figures(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return handler(self) | {name: getattr(self, name) for name in FIGURES}


FIGURES = tuple(name for name, value in vars(Row).items() if isinstance(value, property) and not name.startswith("_"))


class CellRecord(Record):
    """One workload; `failures` maps a contestant to the error that kept it from finishing, `device` a reading of the
    GPU to its [least, median, most] while it was timed."""

    workload: dict[str, Any]
    name: str
    rows: list[Row]
    failures: dict[str, str]
    device: dict[str, list[float] | None] = {}

    @field_validator("workload")
    @classmethod
    def _is_whole(cls, workload: dict[str, Any]) -> dict[str, Any]:
        """What tables and curves read of it."""
        counts = [workload.get(name) for name in ("batch", "steps")]
        if not all(type(count) is int and count >= 1 for count in counts):
            raise ValueError("batch and steps are whole numbers above 0")
        if not isinstance(workload.get("guidance_scale"), int | float) or not isinstance(
            workload.get("scheduler"), str
        ):
            raise ValueError("it needs a guidance_scale and a scheduler")
        if not re.fullmatch(r"[1-9][0-9]*x[1-9][0-9]*", str(workload.get("resolution"))):
            raise ValueError("resolution is WIDTHxHEIGHT")
        return workload

    def row(self, contestant: str) -> Row | None:
        return next((row for row in self.rows if row.contestant == contestant), None)


class Trace(Record):
    """What `sustained.draw_sustained` saw: the begin and the time of each call, and the GPU's readings by name beside the
    moments of them (empty without a GPU)."""

    seconds: float
    images: int
    at_s: list[float]
    total_ms: list[float]
    gpu: dict[str, list[float | None]] = {}


class ContestantRecord(Record):
    """`costs` maps a component to {calls, parameters, flops, bytes}; `cold` to load_ms and first_image_ms; `kernels` is
    what `kernels.profile_denoise` found; `engines` holds the sha256 of each engine of a bundle that was loaded; `taught` are
    the steps and the guidance scale that it drew with in place of the workload's. `weights_of` says what `weights_sha256`
    was taken over, or why there is none."""

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
    taught: dict[str, float] = {}
    accumulates_fp32: bool = False
    vae_dtype: str | None = None
    weights_sha256: str | None = None
    weights_of: str = ""
    random_weights: bool = False
    sustained: Trace | None = None

    @property
    def sustained_change(self) -> float | None:
        """By which share of itself the last tenth of the sustained run's calls is slower than the first (medians)."""
        totals = self.sustained.total_ms if self.sustained else []
        tenth = len(totals) // 10
        return median(totals[-tenth:]) / median(totals[:tenth]) - 1 if tenth else None

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
    """One picture and what it was judged; of most that were judged the picture itself is not kept."""

    contestant: str
    prompt: str
    seed: int
    resolution: str
    steps: int
    guidance_scale: float
    png_base64: str | None
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
    in_turns: str | None = None
    """Why contestants were loaded and measured one after the other, not in the same rounds."""

    @field_validator("environment", "gpu")
    @classmethod
    def _says_which_machine(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        part, name = ("cpu", "model") if info.field_name == "environment" else ("identity", "name")
        if not isinstance(value.get(part), dict) or name not in value[part]:
            raise ValueError(f"it has no {part}.{name}")
        return value

    @model_validator(mode="after")
    def _names_agree(self) -> Results:
        names = [record.name for record in self.contestants]
        rows = [(cell, [row.contestant for row in cell.rows]) for cell in self.cells]
        used = {name for cell, told in rows for name in (*told, *cell.failures)} | {
            one.contestant for one in self.pictures
        }
        if strange := sorted(used - set(names)):
            raise ValueError(f"{strange[0]!r} is no contestant of this file")
        for told in (names, [cell.name for cell in self.cells], *(told for _, told in rows)):
            if len(set(told)) < len(told):
                raise ValueError(f"one of {', '.join(told)} stands there twice")
        return self

    @model_validator(mode="after")
    def _set_baselines(self) -> Results:
        records = {one.name: one for one in self.contestants}
        for cell in self.cells:
            base = cell.row(self.baseline)
            for row in cell.rows:
                row._batch, row._paired = cell.workload["batch"], self.in_turns is None
                row._baseline = base.samples if base is not None and not base.refused else []
                if record := records.get(row.contestant):
                    half = (cell.row(one.name) for one in self.contestants if one.is_in_half(record))
                    row._precision = record.precision
                    row._peak_tflops = self._tflops_of(record)
                    row._in_half = next((other.samples for other in half if other is not None), [])
        return self

    def _tflops_of(self, record: ContestantRecord) -> float | None:
        if self.peak is None:
            return None
        if record.is_in_8_bits:
            return self.peak.tflops_in(record.precision)
        return self.peak.tflops_for(record.accumulates_fp32)

    @property
    def host(self) -> tuple[str, str]:
        """What tells this machine from others: its GPU's UUID or, without one, its id, else names."""
        gpu, environment = self.gpu["identity"], self.environment
        machine = environment.get("machine_id") or environment["cpu"]["model"]
        return str(gpu.get("uuid") or gpu["name"]), str(machine)

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
