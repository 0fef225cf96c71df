"""An ONNX file's weights with something added: what a LoRA makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from distill.common.errors import UserError

Added = Mapping[str, Callable[[], torch.Tensor] | None]
"""What is added to a weight, by the weight's name in the graph, computed when it is asked for; None adds nothing."""


def with_added(model: Path, added: Added) -> dict[str, np.ndarray]:
    """The named weights, in the graph's type. Raises UserError where the graph has no such weight, or has it in 8 bits."""
    initializers = ir.load(model).graph.initializers
    changed = {}
    for name, addition in added.items():
        weight = initializers[name].const_value if name in initializers else None
        if weight is None:
            raise UserError(f"{model} has no weight {name}, to which the LoRA adds: it is for another network")
        if weight.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            raise UserError(
                f"{model} has {name} in 8 bits, and a LoRA is added to 16 or 32: load the fp16 or fp32 UNet"
            )
        array = weight.numpy()
        changed[name] = (
            array
            if addition is None
            else (torch.from_numpy(array.astype(np.float32)) + addition()).numpy().astype(array.dtype)
        )
    return changed
