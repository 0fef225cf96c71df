"""How much work each module of a UNet is: floor and parameters, counted on the meta device.

The floor of a module is the longer of its arithmetic and its memory traffic (weights, input and output once, two bytes a
value), as in `bench.floor.roofline`. Modules of one kind at one level do the same work at the same size, so software reaches
the same share of the floor there: such a group is what a latency is fitted by.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.floor.peaks import Peak
from bench.floor.roofline import Cost
from distill.models.architectures import Architecture
from distill.models.catalogue import count_parameters, meta_unet
from distill.models.conditioning import call_unet
from distill.models.depth import Depth
from distill.models.resolution import Resolution

REST = "the rest"
"""What no cut leaves out: the first and the last layers, the embeddings, the samplers between levels."""


@dataclass(frozen=True)
class Work:
    """One module apart from the modules below it that are listed themselves."""

    group: str
    cost: Cost


@dataclass(frozen=True)
class UnetWork:
    """The teacher's UNet, call by call: module path -> its work, and under `REST` what is in none of them."""

    modules: Mapping[str, Work]
    peak: Peak

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(work.group for work in self.modules.values()))

    def floors(self, kept: Iterable[str]) -> dict[str, float]:
        """By group the floor in milliseconds of one call of a student made from the teacher's modules `kept`."""
        floors = dict.fromkeys(self.groups, 0.0)
        for path in {*kept, REST} & self.modules.keys():
            work = self.modules[path]
            floors[work.group] += work.cost.floor_ms(self.peak.tflops, self.peak.terabytes_per_s)
        return floors

    def parameters(self, kept: Iterable[str]) -> int:
        return sum(self.modules[path].cost.parameters for path in {*kept, REST} & self.modules.keys())


def _group(path: str, depth: Depth) -> str:
    """Its kind and its level, counted from the largest feature maps."""
    kind = "transformer block" if "transformer_blocks" in path else "ResNet" if ".resnets." in path else "transformer"
    side, _, rest = path.partition(".")
    level = len(depth.down) - 1
    if side == "down_blocks":
        level = int(rest.partition(".")[0])
    elif side == "up_blocks":
        level = len(depth.up) - 1 - int(rest.partition(".")[0])
    return f"{kind}, level {level}"


def count_work(architecture: Architecture, resolution: Resolution, batch: int, peak: Peak) -> UnetWork:
    """Of an architecture's UNet at a size; `batch` is twice the number of pictures under guidance."""
    depth, unet = architecture.depth, meta_unet(architecture)
    blocks = [f"{path}.transformer_blocks.{i}" for path, count in depth.transformers.items() for i in range(count)]
    middle = [
        name for name, _ in unet.named_modules() if name.startswith("mid_block.resnets.") and name.count(".") == 2
    ]
    paths = [*depth.resnets, *middle, *depth.transformers, *blocks]
    moved: Counter[str] = Counter()
    with torch.device("meta"), torch.no_grad():
        inputs = {spec.name: torch.empty(spec.shape) for spec in architecture.family.unet_inputs(resolution, batch)}
        hooks = [
            unet.get_submodule(path).register_forward_hook(_count_values(path, moved), with_kwargs=True)
            for path in paths
        ]
        with FlopCounterMode(display=False) as counter:
            call_unet(unet, inputs)
        for hook in hooks:
            hook.remove()
    flops = {name.partition(".")[2]: float(sum(ops.values())) for name, ops in counter.flop_counts.items()}
    flops[REST] = float(counter.get_total_flops())
    own = {
        path: (count_parameters(unet.get_submodule(path)), flops.get(path, 0.0), float(moved[path])) for path in paths
    }
    values = sum(tensor.numel() for tensor in inputs.values()) + inputs["sample"].numel()
    own[REST] = (count_parameters(unet), flops[REST], float(values))
    below: dict[str, list[str]] = defaultdict(list)
    for block in blocks:
        below[block.rpartition(".transformer_blocks.")[0]].append(block)
    below[REST] = [path for path in paths if path not in blocks]
    modules = {}
    for path, (parameters, arithmetic, activations) in own.items():
        parameters -= sum(own[inner][0] for inner in below[path])
        arithmetic -= sum(own[inner][1] for inner in below[path])
        cost = Cost(parameters, arithmetic, 2.0 * (parameters + activations))
        modules[path] = Work(REST if path == REST else _group(path, depth), cost)
    return UnetWork(modules, peak)


def _count_values(path: str, moved: Counter[str]) -> Callable[..., None]:
    def count(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = [*args, *kwargs.values(), *(output if isinstance(output, tuple) else (output,))]
        moved[path] += sum(value.numel() for value in given if isinstance(value, torch.Tensor))

    return count
