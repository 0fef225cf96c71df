"""The same rounding in torch: what a quantised graph should compute, and what one layer alone does to noise_pred."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.quantise.layers import Precision
from export.quantise.scales import Scales, shrunk, to_grid


def _on_grid(x: Tensor, scale: Tensor, precision: Precision) -> Tensor:
    clipped = (x / scale).clamp(-precision.largest, precision.largest)
    if precision.dtype.numpy() == np.int8:
        return clipped.round() * scale
    return clipped.to(torch.float8_e4m3fn).to(x.dtype) * scale


@contextmanager
def rounded(
    network: nn.Module, scales: Mapping[str, Scales], layers: Iterable[str], precision: Precision
) -> Iterator[None]:
    """Inside, these layers of a float32 network round their inputs and weights as the graph does."""
    undo: list[Any] = []
    try:
        for name in layers:
            module, own = network.get_submodule(name), scales[name]
            weight: Any = module.weight
            before = weight.data
            scale = torch.tensor(own.input.astype(np.float32))
            shrink = None if own.shrink is None else torch.tensor(own.shrink.astype(np.float32))
            smaller = shrunk(before.numpy(), own)
            units = own.weight.astype(np.float32).reshape(-1, *[1] * (smaller.ndim - 1))
            weight.data = torch.from_numpy(to_grid(smaller, own.weight, precision).astype(np.float32) * units)

            def look(
                module: nn.Module, inputs: tuple[Tensor, ...], scale: Any = scale, shrink: Any = shrink
            ) -> tuple[Tensor, ...]:
                x = inputs[0] if shrink is None else inputs[0] * shrink
                return (_on_grid(x, scale, precision), *inputs[1:])

            undo.append((weight, before, module.register_forward_pre_hook(look)))
        yield
    finally:
        for weight, before, hook in undo:
            weight.data = before
            hook.remove()
