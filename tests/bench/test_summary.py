import pytest

from bench.measure.rounds import Cell, Sample
from bench.summary import stage_medians, summarise
from bench.workload import Workload
from distill.models.resolution import Resolution


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


def test_nothing_is_held_against_a_refused_baseline():
    cell = Cell(Workload(resolution=Resolution(64, 64), steps=1))
    for name, total in (("teacher", 4.0), ("vega", 2.0)):
        cell.samples[name] = [Sample(total, {"denoise": total}, [total], round=number) for number in range(6)]
        cell.warmups[name], cell.first_ms[name] = 1, [total]
    found = {}
    for faults in ([], ["picture 0 is black"]):
        cell.faults["teacher"] = faults
        found[bool(faults)] = summarise(cell, "teacher", costs={}, peak=None, faults={}).rows[1].speedup
    assert found[False].value == 2.0 and found[True] is None
