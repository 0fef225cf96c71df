import numpy as np
import pytest

from bench.measure.clock import Sample
from bench.measure.stats import drift, launch_interval, median_interval, speedup, spread, stage_medians


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
    found = speedup(calls(teacher), calls(student))
    assert found.value == pytest.approx(2.0, rel=0.01)
    assert found.high - found.low < 0.03
    apart = speedup(calls(teacher), calls(student), paired=False)
    assert apart.low < 1.5 and apart.high > 2.6, "not of the same rounds, the weather counts"
    assert speedup(calls(teacher, launch=1), calls(student)) is None


def calls(totals, launch=0):
    return [Sample(total, {}, [], round=number, launch=launch) for number, total in enumerate(totals)]


def test_between_launches_the_interval_covers_what_differs_from_launch_to_launch():
    rng = np.random.default_rng(3)
    found = [launch_interval(list(medians)) for medians in np.exp(rng.normal(0, 0.05, (2000, 3)))]
    assert np.mean([one.low <= 1 <= one.high for one in found]) == pytest.approx(0.95, abs=0.015)


def test_drift_finds_a_slope_and_not_noise():
    rng = np.random.default_rng(2)
    share, p_value = drift(list(np.linspace(100, 120, 20) + rng.normal(0, 1, 20)))
    assert share == pytest.approx(0.18, abs=0.04) and p_value < 0.01
    assert drift(list(rng.normal(100, 1, 20)))[1] > 0.01
    assert spread([100.0]) == 0.0


def test_stages_are_measured_medians_and_hide_nothing():
    totals = [(10.0, 50.0), (12.0, 40.0), (11.0, 90.0)]
    samples = [Sample(one + two, {"prepare": one, "denoise": two}, []) for one, two in totals]
    stages = stage_medians(samples)
    assert (stages["prepare"], stages["denoise"]) == (11.0, 50.0) and "unexplained" not in stages
    for sample in samples:
        sample.total_ms *= 1.1
    assert stage_medians(samples)["unexplained"] == pytest.approx(6.0)
