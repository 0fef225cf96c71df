"""What the machine did while a workload was timed: throttling, the load of others, the GPU's state between calls."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from bench.measure.gpu import Gpu, device_ranges, throttled_meanwhile
from bench.measure.host import OtherLoad


@dataclass
class _Seen:
    throttle_reasons: set[str] = field(default_factory=set)
    others_cpu_percent: float = 0.0
    states: list[dict[str, Any]] = field(default_factory=list)


class Watch:
    """`look` between the rounds; `visited` at the end of each visit to a workload. Nothing is read inside a timed call."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self._seen: dict[str, _Seen] = {}
        self._begin()
        self.look()

    def _begin(self) -> None:
        self._begun, self._throttled_ns, self._load = time.monotonic(), self.gpu.throttled_ns(), OtherLoad()
        self._states: list[dict[str, Any]] = []

    def look(self) -> None:
        self._states.append(self.gpu.state())

    def visited(self, workload: str) -> tuple[dict[str, Any], dict[str, list[float] | None]]:
        """Over all visits to that workload: the arguments of `faults.machine_faults`, and [least, median, most] of each
        reading of the GPU."""
        seen = self._seen.setdefault(workload, _Seen())
        seen.states += self._states
        seen.others_cpu_percent = max(seen.others_cpu_percent, self._load.percent())
        seen.throttle_reasons |= throttled_meanwhile(
            self._throttled_ns, self.gpu.throttled_ns(), time.monotonic() - self._begun
        )
        seen.throttle_reasons.update(*(state["throttle_reasons"] or [] for state in self._states))
        self._begin()
        faults = {
            "others_cpu_percent": seen.others_cpu_percent,
            "throttle_reasons": sorted(seen.throttle_reasons),
            "other_gpu_processes": self.gpu.other_processes() or 0,
        }
        return faults, device_ranges(seen.states)
