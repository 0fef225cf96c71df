"""A contestant with what is known about it beyond drawing: its folders, its FLOPs, its cold start, its family."""

from __future__ import annotations

import gc
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.contestants.contestants import Spec
from bench.contestants.inventory import describe
from bench.floor.roofline import Costs, ModelConfigs, component_costs
from bench.measure.gpu import Gpu
from bench.measure.measure import cold_start
from bench.measure.workload import PROMPTS, Workload
from distill.models.architectures import find_architecture
from distill.models.families import SDXL_FAMILY, Family, family_of


@dataclass
class Entrant:
    """A contestant with what is known about it beyond drawing."""

    spec: Spec
    contestant: Any
    folders: list[Path]
    configs: Any = None
    why_no_costs: str | None = None
    cold: dict[str, float] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    kernels: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Raises UserError for a folder that is damaged."""
        self.artifacts = [describe(folder) for folder in self.folders]

    @property
    def name(self) -> str:
        return self.spec.name

    def checkpoint(self) -> str | None:
        """Where this contestant's weights come from, as a source that every room knows; None where nobody said."""
        for folder, artifact in zip(self.folders, self.artifacts, strict=True):
            if artifact["kind"] == "checkpoint":
                return str(folder)
        return self.spec.source if self.spec.kind in ("eager", "compiled") else None

    def costs(self, workload: Workload) -> Costs | None:
        return component_costs(self.configs, workload) if self.configs is not None else None


def find_family(entrants: list[Entrant]) -> Family:
    """The family whose widths the first known UNet has; SDXL's where nobody knows."""
    for entrant in entrants:
        if entrant.configs is not None:
            family = family_of(entrant.configs.parsed("unet")["block_out_channels"])
            if family is not None:
                return family
    return SDXL_FAMILY


def find_configs(entrant: Entrant) -> None:
    """Raises UserError for a source that cannot be had."""
    from distill.models.sources import resolve

    contestant = entrant.contestant
    if entrant.spec.kind == "fake":
        entrant.why_no_costs = "a fake contestant computes nothing"
        return
    contestant.check()
    source = entrant.checkpoint()
    if source is None:
        entrant.why_no_costs = "no checkpoint among its artifacts, so its FLOPs are not known"
        return
    kind, _, name = source.partition(":")
    if kind == "random":
        entrant.configs = ModelConfigs.of_architecture(find_architecture(name))
    else:
        is_own = source == contestant.source
        entrant.configs = ModelConfigs.of_folder(contestant.folder if is_own else resolve(source, contestant.workdir))


def family_prompts(family: Family, count: int) -> list[str]:
    """Prompts that the family has learnt: captions of the shapes world for mini, plain prompts otherwise."""
    if family.name != "mini":
        return [PROMPTS[index % len(PROMPTS)] for index in range(count)]
    import numpy as np

    from distill.data.shapes import random_scene

    rng = np.random.default_rng(2024)
    return [random_scene(rng).caption for _ in range(count)]


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


def load_entrant(entrant: Entrant, workload: Workload, gpu: Gpu) -> None:
    """The cold start of one contestant, and what it added to memory."""
    import psutil

    peak = _AllocatorPeak(entrant.contestant.device)
    rss = psutil.Process().memory_info().rss
    used = gpu.state()["memory_used_bytes"]
    start = cold_start(entrant.contestant, workload)
    entrant.cold = {"load_ms": start.load_ms, "first_image_ms": start.first_image_ms}
    after = gpu.state()["memory_used_bytes"]
    entrant.memory = {
        "rss_added_bytes": psutil.Process().memory_info().rss - rss,
        "device_added_bytes": after - used if after is not None and used is not None else None,
        "allocator_peak_bytes": peak.added_bytes,
        "why": gpu.reason,
    }


def import_quietly(device: str) -> None:
    """Imports the common libraries and wakes the GPU's now, so that the first contestant's cold start does not pay for
    everyone's."""
    import diffusers
    import torch
    import transformers

    if device == "cuda":
        some = torch.ones(1, 8, 64, 64, dtype=torch.float16, device=device)
        torch.nn.functional.scaled_dot_product_attention(some, some, some @ some)
        torch.nn.functional.conv2d(some, some[:, :, :3, :3])
        torch.cuda.synchronize()

    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    _ = (diffusers.StableDiffusionXLPipeline, transformers.CLIPTextModelWithProjection)
