"""Percentiles of a sample, none beyond what its size supports."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def percentile_supported(quantile: float, count: int) -> bool:
    """Whether `count` samples support a percentile with 99 % confidence while leaving one sample above it:
    P(Binomial(count, 1 - quantile) <= 1) <= 1 %. That asks for 64 samples at p90 and 662 at p99 (MLPerf's rule)."""
    miss = 1 - quantile
    at_most_one = quantile**count + count * miss * quantile ** (count - 1) if count else 1.0
    return at_most_one <= 0.01


def percentiles(samples: Sequence[float]) -> dict[str, float | None]:
    """p90, p95, p99, each None where the number of samples does not support it."""
    return {
        name: float(np.quantile(samples, quantile)) if percentile_supported(quantile, len(samples)) else None
        for name, quantile in (("p90", 0.90), ("p95", 0.95), ("p99", 0.99))
    }
