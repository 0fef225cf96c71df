"""What the machine did while contestants were timed: a thread reads the GPU, and the load of others is counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bench.measure.gpu import Gpu
from bench.measure.host import OtherLoad
from bench.measure.rounds import Cell

EVERY_S = 0.2  # a picture takes seconds; a reading a fraction of a millisecond of the host
THROTTLED_SHARE = 0.01  # of a call
RANGED = ("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "power_w", "memory_used_bytes")


@dataclass(frozen=True)
class Reading:
    """The GPU's `state` and its counters of throttled time (None where they are missing) at one moment."""

    at_s: float
    state: dict[str, Any]
    throttled_ns: dict[str, int] | None


class Sampler:
    """Reads the GPU every EVERY_S in a thread, from `with` to its end. Without a GPU there is no thread and no reading."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.readings: list[Reading] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read_on, daemon=True)

    def __enter__(self) -> Sampler:
        if self.gpu.present:
            self.read()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self.gpu.present:
            self._thread.join()
            self.read()

    def _read_on(self) -> None:
        while not self._stop.wait(EVERY_S):
            self.read()

    def read(self) -> None:
        self.readings.append(Reading(time.monotonic(), self.gpu.state(), self.gpu.throttled_ns()))


def throttled_within(readings: list[Reading], begin_s: float, end_s: float) -> list[str]:
    """Why the GPU was slower than it could be between two moments: by the counters, from the last reading before to the
    first after, what took more than a hundredth of the time; without counters, what was said in between."""
    before = [one for one in readings if one.at_s <= begin_s][-1:]
    after = [one for one in readings if one.at_s >= end_s][:1]
    reasons: set[str] = set()
    if before and after and before[0].throttled_ns is not None and after[0].throttled_ns is not None:
        least_ns = THROTTLED_SHARE * 1e9 * (end_s - begin_s)
        counted = before[0].throttled_ns
        return sorted(word for word, ns in after[0].throttled_ns.items() if ns - counted.get(word, ns) > least_ns)
    for one in readings:
        if begin_s <= one.at_s <= end_s:
            reasons |= set(one.state["throttle_reasons"] or [])
    return sorted(reasons)


def device_ranges(states: Iterable[dict[str, Any]]) -> dict[str, list[float] | None]:
    """[least, median, most] of each reading; None where there was none."""
    ranges: dict[str, list[float] | None] = {}
    for key in RANGED:
        values = [state[key] for state in states if state[key] is not None]
        ranges[key] = [min(values), median(values), max(values)] if values else None
    return ranges


@dataclass
class _Seen:
    others_cpu_percent: float = 0.0
    states: list[dict[str, Any]] = field(default_factory=list)


class Watch:
    """`visited` at the end of each visit to a workload tells what happened since the last one."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._seen: dict[str, _Seen] = {}
        self._load = OtherLoad()

    def visited(self, cell: Cell) -> tuple[dict[str, Any], dict[str, list[float] | None]]:
        """Over all visits to that workload: the arguments of `faults.machine_faults`, and [least, median, most] of each
        reading of the GPU. Each call that was throttled since the last visit is marked so."""
        seen = self._seen.setdefault(cell.workload.name, _Seen())
        if self._sampler.gpu.present:
            self._sampler.read()
        readings, self._sampler.readings = self._sampler.readings, self._sampler.readings[-1:]
        for sample in (sample for samples in cell.samples.values() for sample in samples):
            ended_s = sample.started_s + sample.total_ms / 1e3
            if readings and sample.started_s >= readings[0].at_s:
                sample.throttled = throttled_within(readings, sample.started_s, ended_s)
        seen.states += [one.state for one in readings]
        seen.others_cpu_percent = max(seen.others_cpu_percent, self._load.percent())
        self._load = OtherLoad()
        faults = {
            "others_cpu_percent": seen.others_cpu_percent,
            "other_gpu_processes": self._sampler.gpu.other_processes() or 0,
        }
        return faults, device_ranges(seen.states)
