"""Passes over an ONNX graph in memory: what makes it small, and names that say something."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants

from distill.models.conditioning import TensorSpec
from export.graph.opening import axis_name

LARGEST_MERGED = 1024
"""Elements: larger constants are not compared."""


def optimize(model: ir.Model, *, infer_shapes: bool = False) -> None:
    """Inlines, folds constants, and removes what is unused or computed twice. In place, exact.

    Translations that spell an operator out leave their inner values without shapes: those can be inferred."""
    weights = set(model.graph.initializers)
    common.InlinePass()(model)
    for _ in range(2):
        fold_constants(model, onnx_shape_inference=infer_shapes, should_fold=_is_no_weight)
        common.RemoveUnusedNodesPass()(model)
    for step in (
        common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        lambda model: _merge_constants(model, weights),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        step(model)


def _merge_constants(model: ir.Model, weights: set[str]) -> None:
    """Equal constants become one; equal weights stay apart, since other weights for the same graph need not be equal."""
    first: dict[tuple[Any, ...], ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        constant = value.const_value
        if name in weights or constant is None or constant.size > LARGEST_MERGED:
            continue
        kept = first.setdefault((constant.dtype, tuple(constant.shape), constant.tobytes()), value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del model.graph.initializers[name]


def _is_no_weight(node: ir.Node) -> bool | None:
    """Weights stay as the checkpoint has them, under their own names: a runtime transposes them at load, and graphs of
    several resolutions can share them."""
    return False if node.op_type == "Transpose" else None


def name_dimensions(model: ir.Model, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Open dimensions of inputs and outputs get their axis' name; symbols inside the graph are expressed by them, between
    spaces, as optimum reads them."""
    names: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, inputs, strict=True):
        for dim, axis in zip(value.shape or (), spec.axes, strict=True):
            if isinstance(dim, ir.SymbolicDim) and axis is not None and axis == axis_name(axis):
                names[str(dim.value)] = axis
    symbols = {}
    for expression, axis in names.items():
        factor, star, symbol = expression.rpartition("*")
        symbols[symbol] = f"{axis} / {factor}" if star else axis
    for value in [*model.graph.inputs, *model.graph.outputs, *(v for node in model.graph for v in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names, symbols) for dim in value.shape])
    for value, spec in zip(model.graph.outputs, outputs, strict=True):
        if value.shape is None or len(value.shape) != len(spec.shape):
            raise RuntimeError(f"output {spec.name} has shape {value.shape}, expected the rank of {spec.shape}")


def specialise(model: ir.Model, inputs: Sequence[TensorSpec]) -> None:
    """Fixes, in place, the open dimensions of a graph at the shapes of `inputs`, and folds what was computed from them.
    The weights are not looked at, so they may stay in their file."""
    sizes: dict[str, int] = {}
    for value, spec in zip(model.graph.inputs, inputs, strict=True):
        axes = zip(spec.axes, spec.shape, strict=True)
        sizes |= {axis: size for axis, size in axes if axis is not None and axis == axis_name(axis)}
        value.shape = ir.Shape(spec.shape)
    for value in [*model.graph.outputs, *(output for node in model.graph for output in node.outputs)]:
        if value.shape is not None:
            dims = [dim if isinstance(dim, int) else _evaluated(str(dim.value), sizes) for dim in value.shape]
            value.shape = ir.Shape([dim for dim in dims if dim is not None]) if None not in dims else None
    fold_constants(model, onnx_shape_inference=False, should_fold=_is_no_weight)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveUnusedNodesPass()(model)


def spell_group_norms(model: ir.Model) -> None:
    """Writes each float32 GroupNormalization, in place, as an InstanceNormalization over groups, scaled and shifted.

    The same numbers; ONNX Runtime 1.31 has a CPU kernel for the one and spells the other out in ten operators. The weights
    are not looked at, so they may stay in their file.
    """
    for node in [node for node in model.graph if node.op_type == "GroupNormalization"]:
        x, scale, shift = node.inputs
        if scale is None or shift is None or scale.dtype != ir.DataType.FLOAT:
            continue
        tape, groups, channels = ir.tape.Tape(), node.attributes["num_groups"].as_int(), scale.shape[0]  # type: ignore[index]
        arrays = {
            "groups": np.array([0, groups, -1]),
            "channels": np.array([0, channels, -1]),
            "ones": np.ones(groups, np.float32),
            "zeros": np.zeros(groups, np.float32),
            "column": np.array([-1, 1]),
        }
        made = {name: tape.initializer(ir.tensor(array, name=f"{node.name}.{name}")) for name, array in arrays.items()}
        grouped = tape.op("Reshape", [x, made["groups"]])
        epsilon = {"epsilon": node.attributes["epsilon"].as_float()}
        normal = tape.op("InstanceNormalization", [grouped, made["ones"], made["zeros"]], epsilon)
        by_channel = tape.op("Reshape", [normal, made["channels"]])
        column_scale, column_shift = (tape.op("Reshape", [value, made["column"]]) for value in (scale, shift))
        scaled = tape.op("Add", [tape.op("Mul", [by_channel, column_scale]), column_shift])
        result = tape.op("Reshape", [scaled, tape.op("Shape", [x])])
        for value in made.values():
            model.graph.register_initializer(value)
        model.graph.insert_before(node, list(tape.nodes))
        node.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
    common.RemoveUnusedNodesPass()(model)
    common.NameFixPass()(model)


def _evaluated(expression: str, sizes: dict[str, int]) -> int | None:
    """The value of a product such as 2 * height / 4 * width; None for any other expression."""
    result = 1
    for term in expression.split(" * "):
        name, _, divisor = term.partition(" / ")
        size = int(name) if name.isdigit() else sizes.get(name)
        if size is None or not (divisor or "1").isdigit():
            return None
        result *= size // int(divisor or 1)
    return result


def _renamed(dim: int | ir.SymbolicDim, names: dict[str, str], symbols: dict[str, str]) -> int | ir.SymbolicDim:
    if isinstance(dim, int) or dim.value is None:
        return dim
    text = str(dim.value)
    if text in names:
        return ir.SymbolicDim(names[text])
    text = re.sub(r" ?(?<!\*)\*(?!\*) ?", " * ", text)
    for symbol, meaning in symbols.items():
        text = text.replace(symbol, meaning)
    return ir.SymbolicDim(text)
