import numpy as np
import pytest

from bench.measure.clock import Sample
from bench.measure.stats import drift, median_interval, ratio_interval, spread, stage_medians


@pytest.mark.parametrize("count", [6, 7, 8, 12, 25])
def test_median_interval_covers_the_true_median_as_often_as_it_claims(count):
    rng = np.random.default_rng(0)
    found = [median_interval(list(samples)) for samples in rng.exponential(1.0, (2000, count))]
    covered = np.mean([one.low <= np.log(2) <= one.high for one in found])
    assert 0.945 <= covered <= 1 - 0.5**count
    assert median_interval([1.0] * 1500).high == 1.0


def test_no_interval_from_fewer_than_six_samples():
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]).low is None
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).low is not None
    with pytest.raises(ValueError, match="no samples"):
        median_interval([])


def test_ratio_of_interleaved_rounds_cancels_what_slowed_a_whole_round():
    rng = np.random.default_rng(1)
    weather = rng.uniform(1, 3, 40)  # the machine is up to three times slower in some rounds
    teacher = 200 * weather * rng.normal(1, 0.01, 40)
    student = 100 * weather * rng.normal(1, 0.01, 40)
    found = ratio_interval(list(teacher), list(student))
    assert found.value == pytest.approx(2.0, rel=0.01)
    assert found.high - found.low < 0.03
    with pytest.raises(ValueError, match="pair"):
        ratio_interval([1.0], [1.0, 2.0])


def test_drift_finds_a_slope_and_not_noise():
    rng = np.random.default_rng(2)
    share, p_value = drift(list(np.linspace(100, 120, 20) + rng.normal(0, 1, 20)))
    assert share == pytest.approx(0.18, abs=0.04) and p_value < 0.01
    assert drift(list(rng.normal(100, 1, 20)))[1] > 0.01
    assert spread([100.0]) == 0.0


def test_stages_sum_to_the_total_and_hide_nothing():
    """Shares are not stretched over what the marks leave out: up to 1 % of it is allowed, the rest is told."""

    def samples(unexplained):
        totals = (100.0, 120.0, 90.0)
        return [
            Sample(total, {"denoise": 0.8 * total, "vae_decode": (0.2 - unexplained) * total}, []) for total in totals
        ]

    for share in (0.0, 0.008, -0.008):
        stages = stage_medians(samples(share))
        assert "unexplained" not in stages
        assert sum(stages.values()) == pytest.approx(100.0, rel=0.01)
    stages = stage_medians(samples(0.1))
    assert stages["unexplained"] == pytest.approx(10.0) and stages["denoise"] == pytest.approx(80.0)
    assert sum(stages.values()) == pytest.approx(100.0)
