from __future__ import annotations

import pytest

from engines.serving.quantiles import percentile_supported, percentiles


@pytest.mark.parametrize(("quantile", "needed"), [(0.90, 64), (0.99, 662)])
def test_percentiles_need_the_published_number_of_samples(quantile: float, needed: int) -> None:
    assert percentile_supported(quantile, needed)
    assert not percentile_supported(quantile, needed - 1)


def test_unsupported_percentiles_are_none() -> None:
    assert percentiles(range(63)) == {"p90": None, "p95": None, "p99": None}
    found = percentiles(range(64))
    assert found["p90"] == pytest.approx(56.7)
    assert found["p99"] is None
