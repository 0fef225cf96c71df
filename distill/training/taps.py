"""Where features are read in teacher and student, and the hooks that read them.

Levels, coarse to fine (BK-SDM uses blocks, the published SSD-1B loss sub-blocks and layers, KOALA self-attention):

    block           output of each down, middle and up block
    sub-block       output of each ResNet and each Transformer2DModel
    layer           sub-block, and the output of each transformer block that the student kept
    self-attention  output of attn1 in each transformer block that the student kept
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn

from distill.common.errors import unknown
from distill.models.architectures import Depth
from distill.models.layer_map import LayerMap, transformer_depths
from distill.training.recipes import Level

LEVELS = get_args(Level)


@dataclass(frozen=True)
class Tap:
    """A pair of module paths whose outputs should agree; the loss term is named after the student's."""

    student: str
    teacher: str


def make_taps(level: str, teacher: Depth, student: Depth, layer_map: LayerMap) -> tuple[Tap, ...]:
    """The taps of one level. Raises UserError for an unknown level.

    A kept transformer block does the work of itself and of the dropped blocks after it, so its output is held
    against the teacher's just before the next kept block; its self-attention against the block it was copied from.
    """
    if level not in LEVELS:
        raise unknown("feature level", level, LEVELS)
    if level == "block":
        paths = [f"{side}_blocks.{i}" for side in ("down", "up") for i in range(3)]
        return tuple(Tap(path, path) for path in [*paths[:3], "mid_block", *paths[3:]])
    if level == "self-attention":
        return tuple(
            Tap(f"{path}.transformer_blocks.{j}.attn1", f"{path}.transformer_blocks.{source}.attn1")
            for path, sources in layer_map.items()
            for j, source in enumerate(sources)
        )
    resnets = [f"down_blocks.{i}.resnets.{j}" for i in range(3) for j in range(2)]
    resnets += [f"up_blocks.{i}.resnets.{j}" for i in range(3) for j in range(3)]
    taps = [Tap(path, path) for path in [*resnets, *transformer_depths(student)]]
    taps.append(Tap("mid_block.resnets.0", "mid_block.resnets.0" if student.mid else "mid_block"))
    if level == "layer":
        depths = transformer_depths(teacher)
        for path, sources in layer_map.items():
            ends = [*(index - 1 for index in sources[1:]), depths[path] - 1]
            block = f"{path}.transformer_blocks"
            taps += [Tap(f"{block}.{j}", f"{block}.{end}") for j, end in enumerate(ends)]
    return tuple(taps)


class FeatureRecorder:
    """Forward hooks on `paths` of `model` (never a wrapped one, so that the names hold under DDP).

    Records only inside `recording()`: the second forward pass of gradient checkpointing, which runs during
    backward, leaves no trace.
    """

    def __init__(self, model: nn.Module, paths: list[str]) -> None:
        """Raises AttributeError for a path that the model lacks."""
        self.features: dict[str, torch.Tensor] = {}
        self._active = False
        self._handles = [model.get_submodule(path).register_forward_hook(self._hook(path)) for path in paths]

    def _hook(self, path: str) -> Any:
        def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._active:  # blocks return (hidden, skips), transformers (sample,), the rest a tensor
                self.features[path] = output if isinstance(output, torch.Tensor) else output[0]

        return record

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.features.clear()
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.features.clear()
