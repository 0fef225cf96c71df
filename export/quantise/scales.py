"""The arithmetic of 8 bits: what a layer's input and weights are divided by, and how weights are rounded.

Symmetric, q = round(x / scale): one scale for an input, one for each output channel of a weight. Linear layers in int8 are
smoothed first [SmoothQuant, arXiv 2211.10438, equation 4]: input channel j is divided by
s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), and column j of the weight multiplied by it, so that channels with rare large
values do not take all the steps of the grid.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from distill.common.errors import UserError
from export.quantise.layers import Layer, Precision
from export.quantise.ranges import Range, Ranges

SMALLEST = 2.0**-20
"""The least scale: sixteen steps above the smallest fp16 number, below which a scale itself would be rounded away."""
MOST_SMOOTHING = 1e3


@dataclass(frozen=True)
class Scales:
    """Of one layer: `input` the scale of its input, `weight` (out,) of its weight's output channels, `shrink` (in,) what
    the input is multiplied by before, or None. All are numbers of the graph's own type."""

    input: np.ndarray
    weight: np.ndarray
    shrink: np.ndarray | None


def read_weight(value: ir.Value) -> np.ndarray:
    """An initializer in float32. Its file is not kept mapped: memory holds one weight at a time."""
    tensor = value.const_value
    assert tensor is not None
    array = tensor.numpy().astype(np.float32)
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return array


def _scale(largest: np.ndarray | float, precision: Precision, dtype: np.dtype) -> np.ndarray:
    """The least number of `dtype` that brings `largest` onto the grid: rounded up, so that nothing is cut off."""
    wanted = np.maximum(np.asarray(largest, np.float64) / precision.largest, SMALLEST)
    with np.errstate(over="ignore"):  # infinity is told by the layer's name
        scale = wanted.astype(dtype)
    return np.where(scale.astype(np.float64) < wanted, np.nextafter(scale, dtype.type(np.inf)), scale).astype(dtype)


def _shrink(inputs: np.ndarray, weights: np.ndarray, alpha: float, dtype: np.dtype) -> np.ndarray:
    """1 / s of equation 4; 1 for channels that are never used."""
    used = (inputs > 0) & (weights > 0)
    smooth = np.ones(len(inputs))
    smooth[used] = inputs[used] ** alpha / weights[used] ** (1 - alpha)
    return (1 / np.clip(smooth, 1 / MOST_SMOOTHING, MOST_SMOOTHING)).astype(dtype)


def shrunk(weight: np.ndarray, scales: Scales) -> np.ndarray:
    """The weight that goes with an input multiplied by `shrink`."""
    return weight if scales.shrink is None else weight / scales.shrink.astype(np.float32)


def to_grid(weight: np.ndarray, scale: np.ndarray, precision: Precision) -> np.ndarray:
    """A weight (out, in, ...) in 8 bits, by the scale of each output channel."""
    divided = weight / scale.astype(np.float32).reshape(-1, *[1] * (weight.ndim - 1))
    clipped = np.clip(divided, -precision.largest, precision.largest)
    kind = precision.dtype.numpy()
    return (np.rint(clipped) if kind == np.int8 else clipped).astype(kind)


def find_scales(
    layers: Iterable[Layer], ranges: Ranges, precision: Precision, alpha: float, percentile: float
) -> dict[str, Scales]:
    """The scales of every layer. Layers that read the same input (a transformer's q, k and v) share its scale and
    smoothing, so that it is rounded once. Raises UserError where a range has other channels than the layer."""
    groups: dict[int, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(id(layer.input), []).append(layer)
    found: dict[str, Scales] = {}
    for group in groups.values():
        weights = {layer.name: read_weight(layer.weight) for layer in group}
        here = [ranges.layers[layer.name] for layer in group]
        _require_channels(group, here, weights)
        found |= _scales_of(group, here, weights, precision, alpha, percentile)
    return found


def _require_channels(group: list[Layer], ranges: list[Range], weights: dict[str, np.ndarray]) -> None:
    for layer, one in zip(group, ranges, strict=True):
        if len(one.channels) != weights[layer.name].shape[1]:
            raise UserError(
                f"the range of {layer.name} has {len(one.channels)} channels, the layer {weights[layer.name].shape[1]}; "
                "calibrate again (leave --ranges out)"
            )


def _scales_of(
    group: list[Layer],
    ranges: list[Range],
    weights: dict[str, np.ndarray],
    precision: Precision,
    alpha: float,
    percentile: float,
) -> dict[str, Scales]:
    """Raises UserError where a scale is beyond the graph's numbers."""
    dtype = group[0].weight.dtype.numpy()  # type: ignore[union-attr]
    if not all(layer.is_linear for layer in group):
        shrink, largest = None, max(one.at(percentile) for one in ranges)
    else:
        inputs = np.max([one.channels for one in ranges], axis=0)
        shrink = None
        if alpha:
            columns = np.max([np.abs(weight).max(axis=0) for weight in weights.values()], axis=0)
            shrink = _shrink(inputs, columns, alpha, dtype)
            inputs = inputs * shrink.astype(np.float64)
        largest = float(inputs.max())
    found = {}
    for layer in group:
        scales = Scales(_scale(largest, precision, dtype), np.zeros(0, dtype), shrink)
        weight = shrunk(weights[layer.name], scales)
        rows = np.abs(weight).reshape(len(weight), -1).max(axis=1)
        found[layer.name] = Scales(scales.input, _scale(rows, precision, dtype), shrink)
        if not (np.isfinite(scales.input) and np.isfinite(found[layer.name].weight).all()):
            raise UserError(
                f"the input of {layer.name} reaches {largest:.3g}, or its weight does: no {dtype.name} holds the scale; "
                f"keep it in half precision (--keep {layer.name})"
            )
    return found
