"""From nothing to the first picture: how long it takes, and what it adds to memory."""

from __future__ import annotations

import gc
import time
import warnings
from importlib import import_module
from typing import Any

from bench.contestants.contestant import Contestant
from bench.measure.clock import make_clock, timed_draw
from bench.measure.gpu import Gpu
from bench.workload import Workload
from distill.models.conditioning import Conditioning


def cold_start(contestant: Contestant, workload: Workload) -> dict[str, float]:
    """`load_ms` reads weights or plans; `first_image_ms` is the first call (lazy allocation, just-in-time compilation)."""
    begin = time.perf_counter_ns()
    contestant.load()
    clock = make_clock(contestant.device)
    loaded = time.perf_counter_ns()
    sample, _ = timed_draw(contestant, workload, clock)
    return {"load_ms": (loaded - begin) / 1e6, "first_image_ms": sample.total_ms}


def measure_cold_start(contestant: Contestant, workload: Workload, gpu: Gpu) -> tuple[dict[str, float], dict[str, Any]]:
    """The cold start, and the memory that it added."""
    import psutil

    peak = _AllocatorPeak(contestant.device)
    rss = psutil.Process().memory_info().rss
    used = gpu.state()["memory_used_bytes"]
    cold = cold_start(contestant, workload)
    after = gpu.state()["memory_used_bytes"]
    memory = {
        "rss_added_bytes": psutil.Process().memory_info().rss - rss,
        "device_added_bytes": after - used if after is not None and used is not None else None,
        "allocator_peak_bytes": peak.added_bytes,
        "why": gpu.reason,
    }
    return cold, memory


class _AllocatorPeak:
    """What a contestant adds, at most, to what torch's allocator already holds on the GPU. Blocks that others left free
    go back first, or NVML would see the newcomer move into them."""

    def __init__(self, device: str) -> None:
        import torch

        gc.collect()
        self._cuda = torch.cuda if device.startswith("cuda") else None
        self._before = 0
        if self._cuda:
            self._cuda.empty_cache()
            self._cuda.reset_peak_memory_stats()
            self._before = self._cuda.memory_allocated()

    @property
    def added_bytes(self) -> int | None:
        """None on a CPU."""
        return self._cuda.max_memory_allocated() - self._before if self._cuda else None


def import_libraries(device: str, kind: Conditioning) -> None:
    """Imports the libraries with the classes of this kind of pipeline, and starts the GPU's, so that the first contestant's
    cold start does not pay for everyone's."""
    import diffusers
    import torch
    import transformers

    if device == "cuda":
        activations = torch.ones(1, 8, 64, 64, dtype=torch.float16, device=device)
        torch.nn.functional.scaled_dot_product_attention(activations, activations, activations @ activations)
        torch.nn.functional.conv2d(activations, activations[:, :, :3, :3])
        torch.cuda.synchronize()

    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    for library, name in [
        ("diffusers", kind.pipeline),
        *kind.networks.values(),
    ]:  # each is imported when it is asked for
        getattr(import_module(library), name)
