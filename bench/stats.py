"""What the samples say: medians with intervals, ratios from interleaved rounds, and their faults, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bench.measure.rounds import STABLE_WITHIN
from bench.results import Estimate

MIN_FOR_INTERVAL = 6  # below six samples even [min, max] covers the median with less than 95 %: 1 - 2 * 0.5**5 = 0.94


def left_out(count: int) -> int:
    """How many of `count` samples may be left out at either end so that what is left still holds the median with 95 %:
    the most, of which a binomial count of one half has no more with at most one chance in forty."""
    outside, ways = 0, 1
    while 40 * (ways := ways + math.comb(count, outside + 1)) <= 2**count:
        outside += 1
    return outside


def median_interval(samples: Sequence[float]) -> Estimate:
    """The median with its 95 % interval between two of the samples, which no distribution escapes (Conover, Practical
    Nonparametric Statistics, 3.2); a percentile bootstrap covers the median of seven samples only 89 times of 100.
    Raises ValueError without samples."""
    if len(samples) == 0:
        raise ValueError("no samples")
    ordered = np.sort(np.asarray(samples, float))
    value = float(np.median(ordered))
    if len(ordered) < MIN_FOR_INTERVAL:
        return Estimate(value=value)
    outside = left_out(len(ordered))
    return Estimate(value=value, low=float(ordered[outside]), high=float(ordered[-1 - outside]))


def ratio_interval(baseline: Sequence[float], other: Sequence[float]) -> Estimate:
    """How many times faster `other` is: the median of the per-round ratios baseline / other.

    Both come from the same interleaved rounds, so what slowed a whole round cancels, and rounds are resampled as
    pairs. Raises ValueError where the rounds do not pair up.
    """
    if len(baseline) != len(other) or len(baseline) == 0:
        raise ValueError(f"{len(baseline)} and {len(other)} samples do not pair up")
    ratios = np.asarray(baseline, float) / np.asarray(other, float)
    return median_interval(list(ratios))


def spread(samples: Sequence[float]) -> float:
    """Coefficient of variation (standard deviation over mean), 0 for fewer than two samples."""
    if len(samples) < 2:
        return 0.0
    return float(np.std(samples, ddof=1) / np.mean(samples))


def drift(samples: Sequence[float]) -> tuple[float, float]:
    """(share by which the last sample differs from the first along the Theil-Sen slope, p-value of Mann-Kendall)."""
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


NOISY_CV = 0.05
DRIFT_SHARE = 0.05
DRIFT_P = 0.01
SUM_WITHIN = 0.01


def diagnose(
    totals_ms: Sequence[float],
    *,
    unaccounted: float,
    queue_ms: float | None = None,
    step_ms: float | None = None,
    floor_ms: float | None = None,
    others_cpu_percent: float | None = None,
    throttle_reasons: Sequence[str] = (),
    other_gpu_processes: int = 0,
    unsettled: float | None = None,
    pictures: Sequence[str] = (),
) -> list[str]:
    """Everything that is wrong with a row, in words; an empty list means nothing was found.

    `unaccounted` is the largest share that stages leave unexplained, `queue_ms` how far the device ran behind the
    host during denoising, `floor_ms` the roofline floor on this machine, `unsettled` the share by which the last two
    calls of the warm-up differed, `pictures` what is visibly wrong with the pictures.
    """
    words = [f"refused: {fault}; this is no result" for fault in pictures]
    median = float(np.median(totals_ms))
    if floor_ms is not None and median < floor_ms:
        words.append(
            f"refused: {median:.1f} ms is faster than the roofline floor of {floor_ms:.1f} ms; this is no result"
        )
    if unaccounted > SUM_WITHIN:
        words.append(f"unexplained: stages leave {unaccounted:.1%} of the total (allowed 1 %)")
    if unsettled is not None and unsettled > STABLE_WITHIN:
        words.append(f"not warmed up: the last two calls of the warm-up still differed by {unsettled:.0%}")
    if (cv := spread(totals_ms)) > NOISY_CV:
        words.append(f"noisy: samples vary by {cv:.0%} (coefficient of variation, 5 % is calm)")
    share, p_value = drift(totals_ms)
    if abs(share) > DRIFT_SHARE and p_value < DRIFT_P:
        words.append(f"drifting: {'slower' if share > 0 else 'faster'} by {abs(share):.0%} from first to last round")
    if queue_ms is not None and step_ms is not None and queue_ms < 0.05 * step_ms:
        words.append("enqueue-bound: the device waits for the host to launch its work")
    if throttle_reasons:
        words.append(f"throttled: {', '.join(throttle_reasons)}")
    if other_gpu_processes:
        words.append(f"not alone: {other_gpu_processes} other process(es) on the GPU")
    if others_cpu_percent is not None and others_cpu_percent > 20:
        words.append(f"not alone: other processes used {others_cpu_percent:.0f} % of one core meanwhile")
    return words


def is_refused(words: Sequence[str]) -> bool:
    return any(word.startswith("refused") for word in words)
