import numpy as np
import pytest

from bench.measure.clock import Sample, enqueue_bound
from bench.measure.faults import are_doubts, is_refused, machine_faults, sample_faults

CALM = [100.0, 101.0, 100.5, 99.5, 100.2, 100.1]


def faults(totals=CALM, explained=1.0, enqueue_bound=0.1, floor_ms=50.0, unsettled=0.01):
    samples = [Sample(total, {"denoise": explained * total}, [10.0], enqueue_bound) for total in totals]
    return sample_faults(samples, floor_ms=floor_ms, unsettled=unsettled)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"floor_ms": 200.0}, "refused"),
        ({"explained": 0.98}, "unexplained"),
        ({"enqueue_bound": 0.6}, "enqueue-bound"),
        ({"unsettled": 0.2}, "not warmed up"),
        ({"totals": [100, 130, 90, 140, 95, 120]}, "noisy"),
        ({"totals": list(np.linspace(100, 110, 10))}, "drifting: slower"),
    ],
)
def test_each_fault_is_said_and_a_calm_row_says_nothing(changes, kind):
    assert faults() == []
    [said] = faults(**changes)
    assert said.startswith(kind) and is_refused([said]) == (kind == "refused")


def test_what_the_machine_showed():
    assert machine_faults() == machine_faults(others_cpu_percent=3.0) == []
    said = machine_faults(other_gpu_processes=2, others_cpu_percent=90.0)
    assert [one.partition(":")[0] for one in said] == ["not alone", "not alone"]
    assert "2 other" in said[0] and "90 %" in said[1]


def test_a_throttled_call_is_blamed_alone():
    samples = [Sample(total, {"denoise": total}, [10.0]) for total in CALM]
    samples[2].throttled = ["power cap"]
    said = sample_faults(samples, floor_ms=None, unsettled=None)
    assert said == ["throttled: power cap in 1 of 6 calls"] and are_doubts(said)
    assert not are_doubts(["enqueue-bound: it is its nature"])


def test_enqueue_bound_is_a_share_of_the_time():
    spans = [("prepare", 5.0), ("denoise", 10.0), ("denoise", 10.0), ("denoise", 20.0), ("vae_decode", 9.0)]
    assert enqueue_bound(spans, [0.0, 0.1, 8.0, 0.2, 0.0]) == pytest.approx(0.75), (
        "one long queue does not hide two waits"
    )
