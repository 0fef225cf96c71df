"""Passes over an ONNX graph in memory: what makes it small, and names that say something."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants

from export.components import TensorSpec


def optimize(model: ir.Model) -> None:
    """Inlines, folds constants, and removes what is unused or computed twice. In place, exact."""
    common.InlinePass()(model)
    for _ in range(2):
        fold_constants(model, onnx_shape_inference=False)
        common.RemoveUnusedNodesPass()(model)
    for step in (
        common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        step(model)


def name_dimensions(model: ir.Model, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> None:
    """Open dimensions of inputs and outputs get their axis' name; symbols inside the graph are expressed by them."""
    names: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, inputs, strict=True):
        for dim, axis in zip(value.shape or (), spec.axes, strict=True):
            if isinstance(dim, ir.SymbolicDim) and axis is not None:
                names[str(dim.value)] = axis
    symbols = {}
    for expression, axis in names.items():
        factor, star, symbol = expression.rpartition("*")
        symbols[symbol] = f"({axis}/{factor})" if star else axis
    for value in [*model.graph.inputs, *model.graph.outputs, *(v for node in model.graph for v in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names, symbols) for dim in value.shape])
    for value, spec in zip(model.graph.outputs, outputs, strict=True):
        if value.shape is None or len(value.shape) != len(spec.shape):
            raise RuntimeError(f"output {spec.name} has shape {value.shape}, expected the rank of {spec.shape}")


def _renamed(dim: int | ir.SymbolicDim, names: dict[str, str], symbols: dict[str, str]) -> int | ir.SymbolicDim:
    if isinstance(dim, int) or dim.value is None:
        return dim
    text = str(dim.value)
    if text in names:
        return ir.SymbolicDim(names[text])
    for symbol, meaning in symbols.items():
        text = text.replace(symbol, meaning)
    return ir.SymbolicDim(text)
