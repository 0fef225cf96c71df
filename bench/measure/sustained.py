"""One contestant without a pause for minutes: what a board does once it is warm, which rounds in turn never show."""

from __future__ import annotations

import time
from typing import Any

from bench.contestants.contestant import Contestant
from bench.measure.clock import make_clock, timed_draw
from bench.measure.gpu import Gpu, energy_per_image
from bench.measure.watch import Sampler
from bench.workload import Workload

TRACED = ("sm_clock_mhz", "temperature_c", "power_w")


def draw_sustained(
    contestant: Contestant, workload: Workload, gpu: Gpu, seconds: float, traced: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(`energy_per_image` over at least `seconds` of drawing, the trace of it). Not `traced`, nothing is drawn where no
    energy can be read.

    The trace is {"seconds", "images", "at_s", "total_ms"}: a value for each call, counted from the first; and under "gpu"
    "at_s" and the readings, none of them without a GPU.
    """
    clock, begin_s = make_clock(contestant.device), time.monotonic()
    at_s: list[float] = []
    totals_ms: list[float] = []

    def draw() -> int:
        at_s.append(time.monotonic() - begin_s)
        totals_ms.append(timed_draw(contestant, workload, clock)[0].total_ms)
        return workload.batch

    with Sampler(gpu) as sampler:
        energy = energy_per_image(gpu, draw, seconds)
        while traced and energy["j_per_image"] is None and time.monotonic() - begin_s < seconds:
            draw()
    trace: dict[str, Any] = {"seconds": time.monotonic() - begin_s, "images": len(at_s) * workload.batch}
    trace |= {"at_s": at_s, "total_ms": totals_ms, "gpu": {}}
    if sampler.readings:
        trace["gpu"] = {"at_s": [one.at_s - begin_s for one in sampler.readings]}
        trace["gpu"] |= {name: [one.state[name] for one in sampler.readings] for name in TRACED}
    return energy, trace
