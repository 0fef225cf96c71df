import numpy as np
import pytest

from bench.stats import (
    diagnose,
    drift,
    is_refused,
    median_interval,
    ratio_interval,
    spread,
)


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


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"floor_ms": 200.0}, "refused"),
        ({"unaccounted": 0.02}, "unexplained"),
        ({"queue_ms": 0.1, "step_ms": 10.0}, "enqueue-bound"),
        ({"throttle_reasons": ["power cap"]}, "power cap"),
        ({"other_gpu_processes": 2}, "2 other"),
        ({"others_cpu_percent": 90.0}, "90 %"),
    ],
)
def test_each_fault_is_said_and_a_calm_row_says_nothing(arguments, word):
    calm = [100.0, 101.0, 100.5, 99.5, 100.2, 100.1]
    assert diagnose(calm, unaccounted=0.0, queue_ms=5.0, step_ms=10.0, floor_ms=50.0, others_cpu_percent=3.0) == []
    words = diagnose(calm, **({"unaccounted": 0.0} | arguments))
    assert len(words) == 1 and word in words[0]
    assert is_refused(words) == (word == "refused")


def test_noise_and_drift_are_said():
    assert "noisy" in diagnose([100, 130, 90, 140, 95, 120], unaccounted=0)[0]
    assert any("drifting: slower" in word for word in diagnose(list(range(100, 160, 4)), unaccounted=0))
