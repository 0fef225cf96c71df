"""What the training step asks of an objective, and what it gives to it.

An objective is a frozen dataclass, a part of a recipe. The step asks it for five things:

    kind                               its name in a recipe's file
    needs_teacher                      whether the teacher is loaded at all
    steady_from                        the step from which on one loss can be compared with the next (the terms' weights
                                       no longer change): from there a diverged loss is told
    draw(size, timesteps, generator)   what is drawn for each sample beside its noise: the timestep, a guidance scale …
    prepare(nets)                      a context manager: all that is done once, before the first step (hooks, a target
                                       network); it gives `terms(student, teacher, batch, step)`, the named loss terms

`terms` calls student and teacher as functions of a batch, as often as the equations say and with the batch changed as
they say: `student({**batch, "timestep": earlier})`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distill.models.module_map import ModuleMap

Batch = Mapping[str, torch.Tensor]
"""The UNet's inputs by name, and the `noise` (n, 4, h, w) that `sample` holds."""
Predict = Callable[[Batch], torch.Tensor]
"""noise_pred (n, 4, h, w) of a batch."""
LossTerms = Callable[[Predict, Predict, Batch, int], dict[str, torch.Tensor]]
"""terms(student, teacher, batch, step): each term of the loss by name, already times its λ; their sum is the loss."""


@dataclass(frozen=True, kw_only=True)
class Nets:
    """Both UNets on their device, never wrapped, so that the names of modules hold under DDP; `teacher` is None where
    the objective needs none. `alphas_cumprod` (timesteps,) is the signal's variance; `unconditional` are the text inputs
    of no prompt, without a batch."""

    student: Any
    teacher: Any
    modules: ModuleMap
    alphas_cumprod: torch.Tensor
    unconditional: Mapping[str, torch.Tensor]
