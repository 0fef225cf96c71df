import numpy as np
import pytest

from bench.measure.clock import Sample
from bench.measure.faults import is_refused, machine_faults, sample_faults

CALM = [100.0, 101.0, 100.5, 99.5, 100.2, 100.1]


def faults(totals=CALM, explained=1.0, queue_ms=5.0, floor_ms=50.0, unsettled=0.01):
    samples = [Sample(total, {"denoise": explained * total}, [10.0], queue_ms) for total in totals]
    return sample_faults(samples, floor_ms=floor_ms, unsettled=unsettled)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"floor_ms": 200.0}, "refused"),
        ({"explained": 0.98}, "unexplained"),
        ({"queue_ms": 0.1}, "enqueue-bound"),
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
    said = machine_faults(throttle_reasons=["power cap"], other_gpu_processes=2, others_cpu_percent=90.0)
    assert [one.partition(":")[0] for one in said] == ["throttled", "not alone", "not alone"]
    assert "power cap" in said[0] and "2 other" in said[1] and "90 %" in said[2]
