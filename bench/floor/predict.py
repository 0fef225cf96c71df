"""What a GPU that is not at hand would take: its floor over the share of it that software reaches there.

That share (the efficiency, floor over measured time) depends on the runtime, on the generation of GPU (Hopper's peak grew
more than anything else in it), and on the model (a smaller one keeps a GPU less busy). Each is one factor, found from all
known figures by median polish [Tukey 1977] of log efficiency = runtime + generation + model. How wrong that is can be said
only where a figure exists: each known figure is predicted from the others, once with what other runtimes do on its
generation, once as if nothing were known of it.
In 8 bits a runtime has a factor of its own, generations and models have those of fp16: hardly anything is published.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import exp, log
from statistics import median

from bench.floor.peaks import PEAKS, PUBLISHED, Published
from bench.floor.roofline import architecture_configs, component_costs, total_floor_ms, total_flops
from bench.workload import Workload
from distill.models.architectures import find_architecture
from distill.models.resolution import Resolution
from engines.choices import EIGHT_BITS

SQUARE = Resolution(1024, 1024)
"""The size of every published figure."""


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


def base_size(model: str) -> Resolution:
    """The first size of an architecture's family: 1024x1024 of SDXL, 512x512 of SD 1.x."""
    return find_architecture(model).family.resolutions[0]


def floor_ms(
    gpu: str, model: str, steps: int, resolution: Resolution | None = None, batch: int = 1, precision: str = "fp16"
) -> float:
    """The floor of one guided call of an architecture of the catalogue, VAE and text encoders included, at `base_size` if no
    resolution is given. `precision` is the UNet's, one that the board has."""
    load = Workload(resolution=resolution or base_size(model), steps=steps, batch=batch)
    costs = component_costs(architecture_configs(model), load)
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
    """Log efficiencies: of each runtime, and what each generation (a compute capability) and each model add to it."""

    runtimes: dict[str, float]
    generations: dict[str, float]
    models: dict[str, float]

    def share(self, gpu: str, runtime: str, model: str = "") -> float:
        """Floor over time. A generation or model without any known figure gets the median of the known ones' factors."""
        generation = self.generations.get(PEAKS[gpu].compute_capability, median(self.generations.values()))
        return exp(self.runtimes[runtime] + generation + self.models.get(model, median(self.models.values())))


def find_shares(known: list[Known]) -> Shares:
    """Runtimes and generations from the figures of the model that most are known of, and from others where it has none, by
    medians of rows and columns in turn until they stay; then each model's median of what they leave over. Runtimes in 8
    bits come last, by the generations and models then found."""
    eight = [one for one in known if one.precision in EIGHT_BITS]
    known = [one for one in known if one.precision not in EIGHT_BITS]
    usual = Counter(one.model for one in known).most_common(1)[0][0]
    ours = [one for one in known if one.model == usual]
    covered = {one.runtime for one in ours}, {PEAKS[one.gpu].compute_capability for one in ours}
    others = [
        one
        for one in known
        if one.model != usual and not (one.runtime in covered[0] and PEAKS[one.gpu].compute_capability in covered[1])
    ]
    points = [(one.runtime, PEAKS[one.gpu].compute_capability, log(one.efficiency)) for one in ours + others]
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
    rests: dict[str, list[float]] = {}
    for one in known:
        told = runtimes[one.runtime] + generations[PEAKS[one.gpu].compute_capability]
        rests.setdefault(one.model, []).append(log(one.efficiency) - told)
    models = {model: median(values) for model, values in rests.items()}
    found = Shares(runtimes | {one.runtime: 0.0 for one in eight}, generations, models)
    gains: dict[str, list[float]] = {}
    for one in eight:
        gains.setdefault(one.runtime, []).append(log(one.efficiency / found.share(one.gpu, one.runtime, one.model)))
    return Shares(runtimes | {name: median(values) for name, values in gains.items()}, generations, models)


@dataclass(frozen=True)
class Prediction:
    """`low_ms` and `high_ms` span every error that the method made on a known figure: the range of its past errors, and no
    interval of any confidence."""

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
    """One guided picture at `base_size`. `total_ms` is None where no known figure is of that runtime, or where the peak is
    `floor_only`."""
    floor = floor_ms(gpu, model, steps, precision=precision)
    known = [one for one in known if one.precision in ("fp16", precision)]
    load = Workload(resolution=base_size(model), steps=steps)
    tflop = total_flops(component_costs(architecture_configs(model), load)) / 1e12
    if PEAKS[gpu].floor_only or runtime not in {one.runtime for one in known}:
        return Prediction(gpu, model, steps, runtime, floor, None, None, None, 0, tflop, precision)
    total = floor / find_shares(known).share(gpu, runtime, model)
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
    return one.floor_ms / find_shares(others).share(one.gpu, one.runtime, one.model)


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
