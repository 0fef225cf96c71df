"""A contestant with known delays: it tests the harness itself, which must give them back.

Busy waiting, not sleeping, because a sleep ends a scheduler's tick late and the lateness would look like ours.
"""

from __future__ import annotations

import time
from dataclasses import KW_ONLY, dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from bench.contestants.contestant import STAGES, Contestant, Mark
from bench.contestants.pictures import Pictures
from bench.workload import Workload
from distill.common.errors import UserError, unknown
from distill.common.options import finite_number

if TYPE_CHECKING:
    import numpy as np


def busy_wait(milliseconds: float) -> None:
    end = time.perf_counter_ns() + int(milliseconds * 1e6)
    while time.perf_counter_ns() < end:
        pass


@lru_cache(maxsize=4)
def _picture(batch: int, height: int, width: int) -> np.ndarray:
    """Noise, made once: the fake's time is in its delays alone."""
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), np.uint8)


@dataclass
class FakeContestant(Contestant):
    """`delays_ms` holds the duration of each stage; `denoise` is one step's. `jitter` widens each call by up to so
    much of itself, by a fixed sequence."""

    delays_ms: dict[str, float] = field(default_factory=dict)
    jitter: float = 0.0
    load_ms: float = 0.0
    calls: int = 0
    _: KW_ONLY
    runtime: str = "fake"

    @classmethod
    def parse(cls, name: str, text: str, **about: Any) -> FakeContestant:
        """`denoise=10,vae_decode=25,...` in milliseconds. Raises UserError."""
        delays = {}
        for part in filter(None, text.split(",")):
            stage, equals, value = part.partition("=")
            if stage not in STAGES:
                raise unknown("stage", stage, STAGES)
            try:
                delays[stage] = finite_number(value)
            except ValueError:
                raise UserError(f"delay {part!r} is not of the form STAGE=MILLISECONDS, e.g. denoise=10") from None
            if not equals or delays[stage] < 0:
                raise UserError(f"delay {part!r}: milliseconds must not be negative")
        return cls(name, delays, **about)

    @property
    def why_no_costs(self) -> str:
        return "a fake contestant computes nothing"

    def load(self) -> None:
        busy_wait(self.load_ms)

    def draw(self, workload: Workload, mark: Mark) -> Pictures:
        self.calls += 1
        factor = 1 + self.jitter * ((self.calls * 0.618034) % 1)
        images = _picture(workload.batch, workload.resolution.height, workload.resolution.width)
        for stage in STAGES:
            for _ in range(workload.steps if stage == "denoise" else 1):
                busy_wait(self.delays_ms.get(stage, 0.0) * factor)
                mark(stage)
        return Pictures(images)
