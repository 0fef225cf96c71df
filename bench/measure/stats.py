"""Medians with intervals, speed-ups from interleaved rounds, spread and drift of timed samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median, stdev

import numpy as np
from pydantic import BaseModel, ConfigDict

from bench.contestants.contestant import STAGES
from bench.measure.clock import Sample

MIN_FOR_INTERVAL = (
    6  # of five samples the smallest and the largest enclose the median only 94 times in 100: 1 - 2 / 2**5
)
T_975 = (
    12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
    2.101, 2.093, 2.086,
)  # fmt: skip
"""Student's t at 97.5 % for 1 to 20 degrees of freedom; more are taken for 20."""
UNEXPLAINED = "unexplained"
"""Stands beside the stages where they leave more than 1 % of the total to it."""
SUM_WITHIN = 0.01


class Estimate(BaseModel):
    """A value with its 95 % interval, None where there are too few samples for one."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    value: float
    low: float | None = None
    high: float | None = None

    def overlaps(self, other: Estimate) -> bool:
        """Whether the two intervals share a point. True where one of them is unknown."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return True
        return self.low <= other.high and other.low <= self.high


def samples_outside(count: int) -> int:
    """How many of `count` sorted samples to drop at each end, so that the rest encloses the median with 95 % confidence.

    The number of samples below the median is binomial, B(count, 1/2). Dropping k at the lower end misses the median
    where at most k samples lie below it, so the answer is the largest k with P(B <= k) <= 2.5 %.
    """
    outside, ways = 0, 1
    while 40 * (ways := ways + math.comb(count, outside + 1)) <= 2**count:
        outside += 1
    return outside


def median_interval(samples: Sequence[float]) -> Estimate:
    """The median, and its 95 % interval between two of the samples (Conover, Practical Nonparametric Statistics, 3.2).

    It holds for any distribution; a percentile bootstrap covers the median of seven samples only 89 times in 100.
    Raises ValueError without samples.
    """
    if len(samples) == 0:
        raise ValueError("no samples")
    ordered = np.sort(np.asarray(samples, float))
    value = float(np.median(ordered))
    if len(ordered) < MIN_FOR_INTERVAL:
        return Estimate(value=value)
    outside = samples_outside(len(ordered))
    return Estimate(value=value, low=float(ordered[outside]), high=float(ordered[-1 - outside]))


def by_launch(samples: Sequence[Sample]) -> dict[int, list[Sample]]:
    """The samples of each process launch."""
    launches: dict[int, list[Sample]] = {}
    for sample in samples:
        launches.setdefault(sample.launch, []).append(sample)
    return launches


def launch_interval(medians: Sequence[float]) -> Estimate:
    """The geometric mean of the launches' medians with Student's 95 % interval of their logarithms.

    Launches of one command differ by more than the rounds within one do (memory layout, neighbours, clocks), so with
    several of them the interval is between launches.
    """
    logs = [math.log(value) for value in medians]
    half = t_975(len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
    return Estimate(value=math.exp(fmean(logs)), low=math.exp(fmean(logs) - half), high=math.exp(fmean(logs) + half))


def t_975(degrees: float) -> float:
    """Student's t at 97.5 %, never too small. Raises IndexError below one degree of freedom."""
    return T_975[min(int(degrees), len(T_975)) - 1]


def estimate_total(samples: Sequence[Sample]) -> Estimate:
    """Milliseconds of a call: between launches where there are several, else the median of one launch's rounds."""
    launches = [[sample.total_ms for sample in launch] for launch in by_launch(samples).values()]
    if len(launches) > 1:
        return launch_interval([median(launch) for launch in launches])
    return median_interval(launches[0])


def round_ratios(baseline: Sequence[Sample], other: Sequence[Sample]) -> list[list[float]]:
    """baseline / other of each round that both finished, launch by launch; launches without such a round are left out."""
    before = {(sample.launch, sample.round): sample.total_ms for sample in baseline}
    launches = [
        [
            before[sample.launch, sample.round] / sample.total_ms
            for sample in launch
            if (sample.launch, sample.round) in before
        ]
        for launch in by_launch(other).values()
    ]
    return [launch for launch in launches if launch]


def speedup(baseline: Sequence[Sample], other: Sequence[Sample], *, paired: bool = True) -> Estimate | None:
    """How many times faster `other` is, over the rounds that both finished; None where there is no such round. Not
    `paired`, where the two were not measured in the same rounds: the ratio of the two medians, from one end of their
    intervals to the other."""
    if not paired:
        before, after = estimate_total(baseline), estimate_total(other)
        if before.low is None or before.high is None or after.low is None or after.high is None:
            return Estimate(value=before.value / after.value)
        return Estimate(value=before.value / after.value, low=before.low / after.high, high=before.high / after.low)
    launches = round_ratios(baseline, other)
    if not launches:
        return None
    return launch_interval([median(one) for one in launches]) if len(launches) > 1 else median_interval(launches[0])


def stage_medians(samples: Sequence[Sample]) -> dict[str, float]:
    """The median of each stage over all calls, in milliseconds; medians need not sum to the median total. What no stage
    explains counts as a stage of its own where its median is above the 1 % allowed."""
    names = list(dict.fromkeys([*STAGES, *(name for sample in samples for name in sample.stages_ms)]))
    medians = {name: median(sample.stages_ms.get(name, 0.0) for sample in samples) for name in names}
    unexplained = median(sample.total_ms - sum(sample.stages_ms.values()) for sample in samples)
    if abs(unexplained) > SUM_WITHIN * median(sample.total_ms for sample in samples):
        medians[UNEXPLAINED] = unexplained
    return medians


def spread(samples: Sequence[float]) -> float:
    """Coefficient of variation (standard deviation over mean), 0 for fewer than two samples."""
    if len(samples) < 2:
        return 0.0
    return float(np.std(samples, ddof=1) / np.mean(samples))


def drift(samples: Sequence[float]) -> tuple[float, float]:
    """(how much the last sample differs from the first along the Theil-Sen slope, as a share of the median; the p-value
    of Mann-Kendall's test). (0, 1) for too few samples."""
    count = len(samples)
    if count < MIN_FOR_INTERVAL:
        return 0.0, 1.0
    array = np.asarray(samples, float)
    first, second = np.triu_indices(count, 1)
    differences = array[second] - array[first]
    slope = float(np.median(differences / (second - first)))
    score = float(np.sign(differences).sum())
    deviation = math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    z = (score - np.sign(score)) / deviation
    return slope * (count - 1) / float(np.median(array)), math.erfc(abs(z) / math.sqrt(2))
