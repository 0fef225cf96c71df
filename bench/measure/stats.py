"""Medians with intervals, speed-ups from interleaved rounds, spread and drift of timed samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import numpy as np
from pydantic import BaseModel, ConfigDict

from bench.contestants.contestant import STAGES
from bench.measure.clock import Sample

MIN_FOR_INTERVAL = (
    6  # of five samples the smallest and the largest enclose the median only 94 times in 100: 1 - 2 / 2**5
)
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


def ratio_interval(baseline: Sequence[float], other: Sequence[float]) -> Estimate:
    """How many times faster `other` is: the median of the per-round ratios baseline / other.

    Element i of both comes from the same round, so what slows a whole round cancels. Raises ValueError where the
    lengths differ.
    """
    if len(baseline) != len(other) or len(baseline) == 0:
        raise ValueError(f"{len(baseline)} and {len(other)} samples do not pair up")
    ratios = np.asarray(baseline, float) / np.asarray(other, float)
    return median_interval(list(ratios))


def speedup(baseline: Sequence[Sample], other: Sequence[Sample]) -> Estimate | None:
    """How many times faster `other` is, over the rounds that both finished; None where there is no such round."""
    before, after = ({sample.round: sample.total_ms for sample in samples} for samples in (baseline, other))
    rounds = [number for number in after if number in before]
    if not rounds:
        return None
    return ratio_interval([before[one] for one in rounds], [after[one] for one in rounds])


def stage_medians(samples: Sequence[Sample]) -> dict[str, float]:
    """Milliseconds of each stage in the median call; they sum to the median total.

    Each stage's share of its own call is taken, the median of the shares over all calls, scaled to the median total:
    medians of single stages would not sum to it. The share that no stage explains counts as a stage of its own, and
    is shown where it is above the 1 % allowed.
    """
    total = median(sample.total_ms for sample in samples)
    names = list(dict.fromkeys([*STAGES, *(name for sample in samples for name in sample.stages_ms)]))
    shares = {name: median(sample.stages_ms.get(name, 0.0) / sample.total_ms for sample in samples) for name in names}
    shares[UNEXPLAINED] = median(1 - sum(sample.stages_ms.values()) / sample.total_ms for sample in samples)
    whole = sum(shares.values())
    if abs(shares[UNEXPLAINED]) <= SUM_WITHIN * whole:
        del shares[UNEXPLAINED]
    return {name: total * share / whole for name, share in shares.items()}


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
