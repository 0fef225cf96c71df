"""Where a denoising step's time goes, by kind of kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bench.contestants.contestant import Contestant
from bench.workload import Workload
from distill.common.errors import describe_error
from distill.common.kernels import by_kind, kernel_times, make_profiler

PROFILED_STEPS = 3


def kernels_of(contestant: Contestant, workload: Workload, step_ms: float | None) -> dict[str, Any]:
    """Milliseconds of a denoising step by kind of kernel (`by_kind`), or why there are none."""
    if contestant.device == "cpu" and contestant.spec.partition("@")[0].partition(":")[0] not in ("eager", "compiled"):
        return {"families_ms": None, "why": "on a CPU torch's profiler sees torch's own operators alone"}
    try:
        return profile_denoise(contestant, workload, step_ms)
    except Exception as error:  # the profiler is torch's, and what it can read differs from driver to driver
        return {"families_ms": None, "why": describe_error(error)}


def profile_denoise(contestant: Contestant, workload: Workload, step_ms: float | None) -> dict[str, Any]:
    """`by_kind` of the denoising steps after the first. `step_ms` is one step as timed without the profiler."""
    import torch

    on_gpu = contestant.device.startswith("cuda")
    short = replace(contestant.asked(workload), steps=PROFILED_STEPS + 1)
    contestant.draw(short, lambda _stage: None)
    profiler = make_profiler(contestant.device)
    done = 0

    def mark(stage: str) -> None:
        nonlocal done
        done += stage == "denoise"
        if stage == "denoise" and done in (1, short.steps):
            if on_gpu:
                torch.cuda.synchronize()
            profiler.start() if done == 1 else profiler.stop()

    contestant.draw(short, mark)
    return by_kind(kernel_times(profiler, contestant.device), PROFILED_STEPS, step_ms)
