"""What a GPU that is not at hand would take: its floor over the efficiency seen on others, with the error of doing so.

The floor of a GPU scales with its peaks; software reaches a share of it (the efficiency, floor over measured time)
that differs by runtime far more than by GPU. So a prediction is floor / median efficiency of one runtime, and its
range runs over the efficiencies seen. How wrong that is can be said only where a figure exists: each known figure is
predicted from all the others of its runtime that stand on another GPU, or another model.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from bench.peaks import PEAKS, PUBLISHED, Published
from bench.roofline import architecture_configs, component_costs, total_floor_ms, total_flops
from bench.workload import Workload
from distill.architectures import Resolution

SQUARE = Resolution(1024, 1024)


@dataclass(frozen=True)
class Known:
    """A latency that exists: published, or measured by this harness on a GPU of the catalogue of peaks."""

    gpu: str
    model: str
    steps: int
    runtime: str
    total_ms: float
    floor_ms: float
    origin: str
    resolution: str = "1024x1024"
    batch: int = 1

    @property
    def efficiency(self) -> float:
        return self.floor_ms / self.total_ms


def floor_ms(gpu: str, model: str, steps: int, resolution: Resolution = SQUARE, batch: int = 1) -> float:
    """The floor of one guided call of an architecture of the catalogue, VAE and text encoders included."""
    peak = PEAKS[gpu]
    costs = component_costs(architecture_configs(model), Workload(resolution=resolution, steps=steps, batch=batch))
    return total_floor_ms(costs, peak.tflops, peak.terabytes_per_s)


def from_published(one: Published) -> Known:
    floor = floor_ms(one.gpu, one.model, one.steps)
    return Known(one.gpu, one.model, one.steps, one.runtime, one.total_ms, floor, one.source)


def published_known() -> list[Known]:
    return [from_published(one) for one in PUBLISHED]


@dataclass(frozen=True)
class Prediction:
    """`low` and `high` come from the best and the worst efficiency seen; None where only one figure calibrates."""

    gpu: str
    model: str
    steps: int
    runtime: str
    floor_ms: float
    total_ms: float | None
    low_ms: float | None
    high_ms: float | None
    calibrated_on: int
    tflop: float


def predict(gpu: str, model: str, steps: int, runtime: str, known: list[Known]) -> Prediction:
    """One guided picture at 1024x1024. `total_ms` is None where no figure of that runtime calibrates."""
    floor = floor_ms(gpu, model, steps)
    tflop = total_flops(component_costs(architecture_configs(model), Workload(resolution=SQUARE, steps=steps))) / 1e12
    shares = [one.efficiency for one in known if one.runtime == runtime]
    if not shares:
        return Prediction(gpu, model, steps, runtime, floor, None, None, None, 0, tflop)
    low, high = (floor / max(shares), floor / min(shares)) if len(shares) > 1 else (None, None)
    return Prediction(gpu, model, steps, runtime, floor, floor / median(shares), low, high, len(shares), tflop)


@dataclass(frozen=True)
class Check:
    """A known figure beside what the others of its runtime predict for it; `error` is (predicted - known) / known."""

    known: Known
    predicted_ms: float
    calibrated_on: int

    @property
    def error(self) -> float:
        return self.predicted_ms / self.known.total_ms - 1


def check_predictions(known: list[Known]) -> list[Check]:
    """Leave one (GPU, model) out: nothing that shares both with the figure takes part in predicting it."""
    checks = []
    for one in known:
        others = [
            other.efficiency
            for other in known
            if other.runtime == one.runtime and (other.gpu, other.model) != (one.gpu, one.model)
        ]
        if others:
            checks.append(Check(one, one.floor_ms / median(others), len(others)))
    return checks


def check_on_measured(measured: list[Known]) -> list[Check]:
    """For each GPU and runtime: calibrated once, on the first figure (the largest model at the main size), then held
    against every other one: other models, sizes, batches."""
    anchors: dict[tuple[str, str], Known] = {}
    checks = []
    for one in measured:
        anchor = anchors.setdefault((one.gpu, one.runtime), one)
        if one is not anchor:
            checks.append(Check(one, one.floor_ms / anchor.efficiency, 1))
    return checks
