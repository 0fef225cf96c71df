"""Predicts what a student takes: each group of work takes its floor times a factor, fitted to measured depths.

t(student) = rest + steps * sum over groups of factor * floor, where the factor is one over the share of the floor that
software reaches with work of that kind and size. It is a Bayesian linear regression [Bishop 2006, section 3.3]: before
anything is measured every group has the share known for the GPU and its runtime (`bench.floor.predict`), give or take
`SPREAD`; each measured depth then narrows them. Intervals hold 90 % of the draws from what is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from statistics import median

import numpy as np

from bench.floor.predict import Known, check_predictions, find_shares
from bench.floor.roofline import ModelConfigs
from bench.results import Results
from bench.search.work import REST, UnetWork
from distill.common.errors import UserError
from distill.models.depth import Depth
from distill.models.families import Family
from distill.models.module_map import make_module_map
from distill.models.resolution import Resolution

SPREAD = 0.3
"""How far the factors of two kinds of work on one machine are apart, as a share (one standard deviation): an assumption,
which gives way to what is measured."""
REST_SPREAD = 3.0
"""The same of the layers that no cut leaves out: they stand for what a call costs beside its arithmetic too (launches, the
sampler's step), which on a small model is much."""
NOISE = 0.02
"""Of a measured latency, as a share."""
DRAWS = 2000
LEAST_DEPTHS = 2


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g}-{self.high:.3g})"


def _interval(value: float, draws: np.ndarray) -> Interval:
    low, high = np.quantile(draws, (0.05, 0.95))
    return Interval(value, float(low), float(high))


@dataclass(frozen=True)
class LatencyModel:
    """`factors` (draws, groups) and `rest_ms` (draws,): what is beside the UNet, the same for every student; `origin` says
    in words what it stands on."""

    groups: tuple[str, ...]
    factors: np.ndarray
    rest_ms: np.ndarray
    steps: int
    origin: str

    def _draws(self, floors: Mapping[str, float]) -> np.ndarray:
        return self.rest_ms + self.steps * self.factors @ self._vector(floors)

    def _vector(self, floors: Mapping[str, float]) -> np.ndarray:
        return np.array([floors[group] for group in self.groups])

    def expected_ms(self, floors: Mapping[str, float]) -> float:
        """Of a student whose UNet call has these floors by group."""
        return float(self.rest_ms.mean() + self.steps * self.factors.mean(0) @ self._vector(floors))

    def latency_ms(self, floors: Mapping[str, float]) -> Interval:
        return _interval(self.expected_ms(floors), self._draws(floors))

    def speedup(self, teacher: Mapping[str, float], student: Mapping[str, float]) -> Interval:
        value = self.expected_ms(teacher) / self.expected_ms(student)
        return _interval(value, self._draws(teacher) / self._draws(student))


def published_model(
    gpu: str, runtime: str, known: Sequence[Known], groups: tuple[str, ...], rest_floor_ms: float, steps: int
) -> LatencyModel:
    """From published latencies alone: one share for all groups, wrong by as much as `check_predictions` says.

    Raises UserError for a runtime without published figures.
    """
    runtimes = sorted({one.runtime for one in known})
    if runtime not in runtimes:
        raise UserError(
            f"no published latency is of the runtime {runtime!r}, only of {', '.join(runtimes)}; measure a model and name "
            "its results file: --measured"
        )
    share = find_shares(list(known)).share(gpu, runtime)
    wrong = [log(1 + check.error) for check in check_predictions(list(known))]
    generator = np.random.default_rng(0)
    common = np.exp(-generator.choice(wrong, DRAWS)) / share
    apart = 1 + SPREAD * generator.standard_normal((DRAWS, len(groups))).clip(-2, 2)
    count = sum(one.runtime == runtime for one in known)
    origin = f"{count} published latencies of {runtime}, on {len(known)} of any runtime; nothing measured"
    return LatencyModel(groups, common[:, None] * apart, rest_floor_ms * common, steps, origin)


@dataclass(frozen=True)
class MeasuredDepth:
    """`call_ms` is the median of one UNet call, `rest_ms` of what is beside the UNet in a picture."""

    name: str
    depth: Depth
    call_ms: float
    rest_ms: float


def measured_depths(
    results: Results, family: Family, resolution: Resolution, runtime: str | None
) -> list[MeasuredDepth]:
    """The models of a family in a results file that were measured at a size with guidance, one picture at a time, on the
    runtime whose name has `runtime` in it; where that is None, on the baseline's.

    Raises UserError where there are fewer than `LEAST_DEPTHS` different ones.
    """
    wanted = results.contestant(results.baseline).runtime if runtime is None else runtime
    found: dict[str, MeasuredDepth] = {}
    for cell in results.cells:
        load = cell.workload
        if load["resolution"] != str(resolution) or load["guidance_scale"] <= 1 or load["batch"] != 1:
            continue
        for row in cell.rows:
            record = results.contestant(row.contestant)
            if row.refused or record.failed_guard or wanted not in record.runtime or not record.configs:
                continue
            unet = ModelConfigs(tuple(record.configs.items())).parsed("unet")
            if family.fits(unet):
                depth = Depth.from_config(unet)
                beside = median(sample.total_ms - sum(sample.steps_ms) for sample in row.samples)
                found.setdefault(str(depth), MeasuredDepth(row.contestant, depth, row.step_ms, beside))
    if len(found) < LEAST_DEPTHS:
        raise UserError(
            f"the results file has {len(found)} model(s) of the family {family.name} at {resolution}, with guidance, one "
            f"picture at a time, on {wanted!r}; a fit needs {LEAST_DEPTHS} of different depth: "
            "python -m bench run --contestants A=... B=..."
        )
    return list(found.values())


def measured_model(work: UnetWork, teacher: Depth, measured: Sequence[MeasuredDepth], steps: int) -> LatencyModel:
    """Fitted to measured depths, each of which counts by its relative error."""
    groups = work.groups
    floors = np.array([_floors(work, teacher, one.depth) for one in measured])
    times = np.array([one.call_ms for one in measured])
    usual = float(np.median(times / floors.sum(1)))
    rows = floors / times[:, None] / NOISE
    certainty = 1 / (usual * np.array([REST_SPREAD if group == REST else SPREAD for group in groups])) ** 2
    covariance = np.linalg.inv(rows.T @ rows + np.diag(certainty))
    mean = covariance @ (rows.T @ np.full(len(times), 1 / NOISE) + usual * certainty)
    generator = np.random.default_rng(0)
    spread = generator.multivariate_normal(np.zeros(len(groups)), covariance, DRAWS)
    factors = mean + spread - spread.mean(0)  # their mean is the fit's, not that of so many draws
    beside = np.array([one.rest_ms for one in measured])
    rest = np.median(beside) * (1 + NOISE * generator.standard_normal(DRAWS))
    return LatencyModel(groups, factors, rest, steps, f"{len(measured)} measured depths")


def _floors(work: UnetWork, teacher: Depth, depth: Depth) -> list[float]:
    kept = make_module_map("first", teacher, depth).paths.values()
    return [*work.floors(kept).values()]


@dataclass(frozen=True)
class Check:
    """A measured depth beside what the others predict for one call of it; `error` is (predicted - measured) / measured."""

    name: str
    depth: str
    measured_ms: float
    predicted_ms: float

    @property
    def error(self) -> float:
        return self.predicted_ms / self.measured_ms - 1


def check_measured(work: UnetWork, teacher: Depth, measured: Sequence[MeasuredDepth]) -> list[Check]:
    """Each measured depth, predicted from the others alone."""
    checks = []
    for one in measured:
        others = [other for other in measured if other is not one]
        floors = dict(zip(work.groups, _floors(work, teacher, one.depth), strict=True))
        others_ms = replace(measured_model(work, teacher, others, steps=1), rest_ms=np.zeros(1))
        predicted = others_ms.expected_ms(floors)
        checks.append(Check(one.name, str(one.depth), one.call_ms, predicted))
    return checks


def median_error(checks: Iterable[Check]) -> float:
    return median(abs(check.error) for check in checks)
