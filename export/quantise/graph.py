"""Writes the Q/DQ pairs into a UNet's graph: one pass, in which no weight is held.

    x ── Mul (smoothing) ── QuantizeLinear ── DequantizeLinear ──┐
    weight in 8 bits ── DequantizeLinear ── (Transpose) ──────── Conv | MatMul | Gemm

A runtime takes such a pair on both sides of an operator for an 8-bit kernel. A linear layer's weight is dequantised before
its Transpose, by output channel as it is stored: after it, a runtime may take the weight for an activation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from export.quantise.layers import Layer, Precision
from export.quantise.scales import Scales, read_weight, shrunk, to_grid


def write_pairs(model: ir.Model, layers: Sequence[Layer], scales: dict[str, Scales], precision: Precision) -> None:
    """In place. Weights are read, rounded and forgotten one after the other when the model is saved."""
    graph = model.graph
    zero = _initializer(graph, "zero_point", ir.tensor(np.zeros((), precision.dtype.numpy()), name="zero_point"))
    quantised: dict[int, ir.Value] = {}
    for layer in layers:
        own = scales[layer.name]
        value = layer.input
        if id(value) not in quantised:
            quantised[id(value)] = _pair(graph, layer, own, zero)
        weight = _lazy_weight(graph, layer, own, precision)
        scale = _initializer(graph, f"{weight.name}_scale", ir.tensor(own.weight, name=f"{weight.name}_scale"))
        [reader] = [usage.node for usage in layer.weight.uses()]
        restored = _insert(graph, reader, "DequantizeLinear", [weight, scale], f"{layer.name}.weight", axis=0)
        layer.weight.replace_all_uses_with(restored)
        graph.initializers.pop(str(layer.weight.name))
        layer.node.replace_input_with(0, quantised[id(value)])


def _pair(graph: ir.Graph, layer: Layer, scales: Scales, zero: ir.Value) -> ir.Value:
    name, value = layer.name, layer.input
    if scales.shrink is not None:
        shrink = _initializer(graph, f"{name}.shrink", ir.tensor(scales.shrink, name=f"{name}.shrink"))
        value = _insert(graph, layer.node, "Mul", [value, shrink], f"{name}.smooth")
    scale = _initializer(graph, f"{name}.input_scale", ir.tensor(scales.input, name=f"{name}.input_scale"))
    value = _insert(graph, layer.node, "QuantizeLinear", [value, scale, zero], f"{name}.quantise")
    return _insert(graph, layer.node, "DequantizeLinear", [value, scale, zero], f"{name}.dequantise")


def _insert(
    graph: ir.Graph, before: ir.Node, kind: str, inputs: Sequence[ir.Value], name: str, **attributes: int
) -> ir.Value:
    node = ir.node(kind, inputs, attributes or None, name=f"{name}/{kind}")
    node.outputs[0].name = f"{name}.{kind}"
    graph.insert_before(before, [node])
    return node.outputs[0]


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _lazy_weight(graph: ir.Graph, layer: Layer, scales: Scales, precision: Precision) -> ir.Value:
    source, name = layer.weight, f"{layer.weight.name}_{precision.name}"

    def rounded() -> ir.TensorProtocol:
        return ir.tensor(to_grid(shrunk(read_weight(source), scales), scales.weight, precision), name=name)

    assert source.const_value is not None
    tensor = ir.LazyTensor(rounded, dtype=precision.dtype, shape=ir.Shape(source.const_value.shape.numpy()), name=name)
    return _initializer(graph, name, tensor)
