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
from typing import Any, Literal, get_args

import torch
from torch import nn

from distill.common.errors import UserError, unknown
from distill.models.module_map import ModuleMap

Level = Literal["block", "sub-block", "layer", "self-attention"]
"""Which features are compared."""
LEVELS = get_args(Level)


@dataclass(frozen=True)
class Tap:
    """A pair of module paths whose outputs should agree; the loss term is named after the student's."""

    student: str
    teacher: str


def make_taps(level: str, modules: ModuleMap) -> tuple[Tap, ...]:
    """The taps of one level. Raises UserError for an unknown level.

    A kept transformer block does the work of itself and of the dropped blocks after it, so its output is held
    against the teacher's just before the next kept block; its self-attention against the block it was copied from. A
    student without a middle block has no tap there; its lowest level is tapped where the teacher's ends alike.
    """
    if level not in LEVELS:
        raise unknown("feature level", level, LEVELS)
    teacher, student = modules.teacher, modules.student
    if level == "block":
        downs = [f"down_blocks.{i}" for i in range(len(student.down))]
        if len(student.down) < len(teacher.down):
            downs.pop()  # the teacher's samples down at its end
        mid = [] if student.mid is None else ["mid_block"]
        return tuple(
            _mapped(modules, path) for path in [*downs, *mid, *(f"up_blocks.{i}" for i in range(len(student.up)))]
        )
    if level == "self-attention":
        return tuple(
            _mapped(modules, f"{path}.transformer_blocks.{j}.attn1")
            for path, count in student.transformers.items()
            for j in range(count)
        )
    taps = [_mapped(modules, path) for path in [*student.resnets, *student.transformers]]
    if student.mid is not None:
        taps.append(Tap("mid_block.resnets.0", "mid_block.resnets.0" if student.mid else "mid_block"))
    if level == "layer":
        for path in student.transformers:
            source = modules.paths[path]
            ends = [*(index - 1 for index in modules.blocks(path)[1:]), teacher.transformers[source] - 1]
            taps += [
                Tap(f"{path}.transformer_blocks.{j}", f"{source}.transformer_blocks.{i}") for j, i in enumerate(ends)
            ]
    return tuple(taps)


def _mapped(modules: ModuleMap, path: str) -> Tap:
    return Tap(path, modules.source(path))


class FeatureRecorder:
    """Forward hooks on `paths` of `model` (never a wrapped one, so that the names hold under DDP).

    Records only inside `recording()`: the second forward pass of gradient checkpointing, which runs during
    backward, leaves no trace.
    """

    def __init__(self, model: nn.Module, paths: list[str]) -> None:
        """Raises UserError for a path that the model lacks."""
        self.features: dict[str, torch.Tensor] = {}
        self._active = False
        modules = dict(model.named_modules()) if paths else {}
        if missing := [path for path in paths if path not in modules]:
            raise UserError(f"taps: there is no module {missing[0]!r} in {type(model).__name__} of this depth")
        self._handles = [modules[path].register_forward_hook(self._hook(path)) for path in paths]

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
