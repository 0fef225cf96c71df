"""What each student of a teacher costs: latency, speed-up and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.floor.peaks import PEAKS
from bench.floor.predict import published_known
from bench.floor.roofline import ModelConfigs, component_costs
from bench.results import Results
from bench.search.latency import (
    Check,
    Interval,
    LatencyModel,
    check_measured,
    measured_depths,
    measured_model,
    published_model,
)
from bench.search.work import UnetWork, count_work
from bench.workload import Workload
from distill.common.errors import UserError
from distill.models.architectures import Architecture
from distill.models.module_map import ModuleMap, make_module_map


@dataclass(frozen=True)
class StudentCosts:
    """`workload` is the picture whose latency it is, on the `gpu` of a peak's name; `checks` are measured depths, each
    predicted from the others."""

    architecture: Architecture
    workload: Workload
    gpu: str
    runtime: str
    work: UnetWork
    model: LatencyModel
    checks: tuple[Check, ...] = ()

    @property
    def machine(self) -> str:
        return f"{self.gpu}, {self.runtime}"

    @property
    def teacher(self) -> ModuleMap:
        return make_module_map("first", self.architecture.depth, self.architecture.depth)

    def _floors(self, modules: ModuleMap) -> Mapping[str, float]:
        return self.work.floors(modules.paths.values())

    def expected_ms(self, modules: ModuleMap) -> float:
        return self.model.expected_ms(self._floors(modules))

    def latency_ms(self, modules: ModuleMap) -> Interval:
        return self.model.latency_ms(self._floors(modules))

    def speedup(self, modules: ModuleMap) -> Interval:
        return self.model.speedup(self._floors(self.teacher), self._floors(modules))

    def parameters(self, modules: ModuleMap) -> int:
        """Of the student's UNet."""
        return self.work.parameters(modules.paths.values())


def published_costs(
    architecture: Architecture, checkpoint: Path, gpu: str, runtime: str, workload: Workload
) -> StudentCosts:
    """On a GPU of the list, from published figures alone. Raises UserError for a runtime without any."""
    peak = PEAKS[gpu]
    work = count_work(architecture, workload.resolution, workload.unet_batch, peak)
    beside = component_costs(ModelConfigs.of_folder(checkpoint), workload)
    rest = sum(
        calls * c.floor_ms(peak.tflops, peak.terabytes_per_s) for name, (calls, c) in beside.items() if name != "unet"
    )
    model = published_model(gpu, runtime, published_known(), work.groups, rest, workload.steps)
    return StudentCosts(architecture, workload, peak.name, runtime, work, model)


def measured_costs(
    architecture: Architecture, results: Results, workload: Workload, runtime: str | None
) -> StudentCosts:
    """On the machine of a results file. Raises UserError where it has no peak, or too few models to fit."""
    if results.peak is None:
        raise UserError(
            "the results file names no peak of its GPU, so nothing can be predicted for it; leave --measured out"
        )
    work = count_work(architecture, workload.resolution, workload.unet_batch, results.peak)
    measured = measured_depths(results, architecture.family, workload.resolution, runtime)
    model = measured_model(work, architecture.depth, measured, workload.steps)
    checks = tuple(check_measured(work, architecture.depth, measured)) if len(measured) > 2 else ()
    runtime = runtime or results.contestant(results.baseline).runtime
    return StudentCosts(architecture, workload, results.peak.name, runtime, work, model, checks)
