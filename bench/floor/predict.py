"""What a GPU that is not at hand would take: its floor over the share of it that software reaches there.

That share (the efficiency, floor over measured time) depends on the runtime, and on the generation of GPU: Hopper's peak
grew more than anything else in it. Each is one factor, found from all known figures by median polish [Tukey 1977] of
log efficiency = runtime + generation. How wrong that is can be said only where a figure exists: each known figure is
predicted from the others, once with what other runtimes do on its generation, once as if nothing were known of it.
In 8 bits a runtime has a factor of its own, and generations have those of fp16: hardly anything is published.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log
from statistics import median

from bench.floor.peaks import PEAKS, PUBLISHED, Published
from bench.floor.roofline import architecture_configs, component_costs, total_floor_ms, total_flops
from bench.workload import Workload
from distill.models.resolution import Resolution
from engines.choices import EIGHT_BITS

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
    resolution: str = str(SQUARE)
    batch: int = 1
    precision: str = "fp16"

    @property
    def efficiency(self) -> float:
        return self.floor_ms / self.total_ms


def floor_ms(
    gpu: str, model: str, steps: int, resolution: Resolution = SQUARE, batch: int = 1, precision: str = "fp16"
) -> float:
    """The floor of one guided call of an architecture of the catalogue, VAE and text encoders included. `precision` is the
    UNet's, one that the board has."""
    costs = component_costs(architecture_configs(model), Workload(resolution=resolution, steps=steps, batch=batch))
    floor = total_floor_ms(costs, PEAKS[gpu], precision)
    assert floor is not None
    return floor


def from_published(one: Published) -> Known:
    floor = floor_ms(one.gpu, one.model, one.steps, precision=one.precision)
    known = (one.gpu, one.model, one.steps, one.runtime, one.total_ms, floor, one.source)
    return Known(*known, precision=one.precision)


def published_known() -> list[Known]:
    return [from_published(one) for one in PUBLISHED]


@dataclass(frozen=True)
class Shares:
    """Log efficiencies: of each runtime, and what each generation (a compute capability) adds to it."""

    runtimes: dict[str, float]
    generations: dict[str, float]

    def share(self, gpu: str, runtime: str) -> float:
        """Floor over time. A generation without any known figure gets the median of the known ones' factors."""
        usual = median(self.generations.values())
        return exp(self.runtimes[runtime] + self.generations.get(PEAKS[gpu].compute_capability, usual))


def find_shares(known: list[Known]) -> Shares:
    """Medians of rows and columns in turn, until they stay; runtimes in 8 bits after that, by the generations then found."""
    eight = [one for one in known if one.precision in EIGHT_BITS]
    points = [
        (one.runtime, PEAKS[one.gpu].compute_capability, log(one.efficiency)) for one in known if one not in eight
    ]
    runtimes = dict.fromkeys((runtime for runtime, _, _ in points), 0.0)
    generations = dict.fromkeys((generation for _, generation, _ in points), 0.0)
    for _ in range(100):
        before = runtimes | generations
        for name in runtimes:
            runtimes[name] = median(value - generations[where] for what, where, value in points if what == name)
        for name in generations:
            generations[name] = median(value - runtimes[what] for what, where, value in points if where == name)
        if runtimes | generations == before:
            break
    found = Shares(runtimes | {one.runtime: 0.0 for one in eight}, generations)
    rest: dict[str, list[float]] = {name: [] for name in found.runtimes.keys() - runtimes.keys()}
    for one in eight:
        rest[one.runtime].append(log(one.efficiency / found.share(one.gpu, one.runtime)))
    return Shares(runtimes | {name: median(values) for name, values in rest.items()}, generations)


@dataclass(frozen=True)
class Prediction:
    """`low` and `high` hold every error that the method made on a known figure."""

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
    precision: str = "fp16"


def predict(gpu: str, model: str, steps: int, runtime: str, known: list[Known], precision: str = "fp16") -> Prediction:
    """One guided picture at 1024x1024. `total_ms` is None where no known figure is of that runtime, or where the peak is
    `floor_only`."""
    floor = floor_ms(gpu, model, steps, precision=precision)
    known = [one for one in known if one.precision in ("fp16", precision)]
    tflop = total_flops(component_costs(architecture_configs(model), Workload(resolution=SQUARE, steps=steps))) / 1e12
    if PEAKS[gpu].floor_only or runtime not in {one.runtime for one in known}:
        return Prediction(gpu, model, steps, runtime, floor, None, None, None, 0, tflop, precision)
    total = floor / find_shares(known).share(gpu, runtime)
    errors = [check.error for check in check_predictions(known)]
    low, high = (total / (1 + max(errors)), total / (1 + min(errors))) if errors else (None, None)
    return Prediction(gpu, model, steps, runtime, floor, total, low, high, len(known), tflop, precision)


@dataclass(frozen=True)
class Check:
    """A known figure beside what the others predict for it; `error` is (predicted - known) / known, `blind_error` the
    same with every figure of its generation left out, None where its runtime then has none."""

    known: Known
    predicted_ms: float
    calibrated_on: int
    blind_error: float | None = None

    @property
    def error(self) -> float:
        return self.predicted_ms / self.known.total_ms - 1


def _predicted_ms(one: Known, others: list[Known]) -> float | None:
    if one.runtime not in {other.runtime for other in others}:
        return None
    return one.floor_ms / find_shares(others).share(one.gpu, one.runtime)


def check_predictions(known: list[Known]) -> list[Check]:
    """Leave one (GPU, model, runtime) out: nothing that shares all three takes part in predicting it."""
    checks = []
    for one in known:
        ours = (one.gpu, one.model, one.runtime)
        others = [other for other in known if (other.gpu, other.model, other.runtime) != ours]
        generation = PEAKS[one.gpu].compute_capability
        elsewhere = [other for other in others if PEAKS[other.gpu].compute_capability != generation]
        predicted_ms, blind_ms = _predicted_ms(one, others), _predicted_ms(one, elsewhere)
        if predicted_ms is not None:
            blind_error = blind_ms / one.total_ms - 1 if blind_ms is not None else None
            checks.append(Check(one, predicted_ms, len(others), blind_error))
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
