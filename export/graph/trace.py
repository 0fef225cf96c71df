"""From a network to an ONNX graph: torch.export, then torch.onnx.export(dynamo=True), without detours.

The exporter traces the captured program once more to decompose it, although every operator of these networks has a
direct ONNX translation. With open dimensions that second tracing costs more than the first. So the program is made
lean here (asserts and operators that do nothing in inference go) and, where nothing is left that needs
decomposition, is handed over as it is. A program with any other operator takes the exporter's own way.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from inspect import Parameter, signature
from typing import Any
from unittest import mock

import torch
import torch.fx.experimental._config as _fx_config
from onnx_ir import Model
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from distill.models.conditioning import Config, TensorSpec
from export.components import Component
from export.graph.opening import CannotOpen, axis_name, choose_axes, open_dimensions, scaled, sized
from export.graph.passes import name_dimensions, optimize
from export.graph.weights import read_when_written

aten = torch.ops.aten
WHOLE_ATTENTION_OPSET = 23
MAX_BATCH = 63
"""diffusers' upsampler takes another way from 64 on; a guidance batch of 31 images is enough."""

_ELEMENTWISE = {
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.sub.Tensor,
    aten.cat.default,
    aten.concat.default,
}
_COMPARISONS = {aten.eq.Scalar, aten.lt.Tensor}
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device}
_ASSERTS = {aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.msg}
_DIRECT = {
    str(operator)
    for operator in (
        *(aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.sub.Tensor, aten.exp.default, aten.sin.default),
        *(aten.cos.default, aten.silu.default, aten.gelu.default, aten.sigmoid.default, aten.relu.default),
        *(aten.tanh.default, aten.clamp.default, aten.linear.default, aten.conv2d.default, aten.layer_norm.default),
        *(aten.group_norm.default, aten.scaled_dot_product_attention.default, aten.transpose.int, aten.permute.default),
        *(aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.expand.default, aten.slice.Tensor),
        *(aten.flatten.using_ints, aten.cat.default, aten.concat.default, aten.chunk.default, aten.embedding.default),
        *(aten.upsample_nearest2d.vec, aten.arange.start, aten.sym_size.int, aten._to_copy.default),
        *(aten.squeeze.dim, aten.select.int, aten.constant_pad_nd.default, aten.arange.default, aten.full.default),
        *(aten.eq.Scalar, aten.lt.Tensor, aten.masked_fill.Scalar, aten.argmax.default, aten.index.Tensor),
    )
} | {"<built-in function getitem>", "<built-in function mul>"}


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports optional packages that are not installed, and diffusers' harmless conversions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx._internal.exporter._registration", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _without_repeated_work(*, skip_promotion: bool) -> Iterator[None]:
    """Spares the exporter two things: building the table of translations anew for each graph, and running a whole graph
    symbolically to find mixed types where `make_lean` has seen that there are none. Private parts of torch: where they
    have moved, exporting is slower and nothing else."""
    from torch.onnx._internal.exporter import _fx_passes, _registration

    with ExitStack() as stack:
        if skip_promotion and hasattr(_fx_passes, "insert_type_promotion_nodes"):
            stack.enter_context(mock.patch.object(_fx_passes, "insert_type_promotion_nodes", lambda graph_module: None))
        registry = getattr(_registration, "ONNXRegistry", None)
        if registry is not None and hasattr(registry, "from_torchlib"):
            make = registry.from_torchlib
            cached = staticmethod(lambda opset_version: _registry(make, opset_version))
            stack.enter_context(mock.patch.object(registry, "from_torchlib", cached))
        yield


@cache
def _registry(make: Callable[[int], Any], opset: int) -> Any:
    return make(opset)


def _replacement(node: Node) -> Node | None:
    """The input that `node` merely passes on in inference, if it does."""
    source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if source is None:
        return None
    if node.target in (aten.contiguous.default, aten.alias.default, aten.detach_.default, aten.detach.default):
        return source
    if node.target is aten.dropout.default and not node.args[2]:
        return source
    is_cast = node.target in _CASTS or node.target is aten._to_copy.default
    return source if is_cast and node.meta["val"].dtype == source.meta["val"].dtype else None


def _mixes_types(node: Node) -> bool:
    """True where an elementwise operator is given numbers of unlike types, which ONNX does not promote."""
    if node.target not in _ELEMENTWISE | _COMPARISONS:
        return False
    values = [argument.meta["val"] for argument in node.all_input_nodes]
    if not all(isinstance(value, torch.Tensor) for value in values):
        return True
    common = values[0].dtype if node.target in _COMPARISONS else node.meta["val"].dtype
    has_fraction = any(isinstance(argument, float) for argument in node.args) and not common.is_floating_point
    return has_fraction or any(value.dtype != common for value in values)


def _is_fresh(argument: Any) -> bool:
    """True for a new tensor that nothing else sees: to write into it is to make another."""
    return isinstance(argument, Node) and argument.target is aten.full.default and len(argument.users) == 1


def make_lean(program: ExportedProgram) -> bool:
    """Takes out, in place, what does nothing in inference. True where every operator left is translated directly."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        source = _replacement(node)
        if node.target in _ASSERTS:
            graph.erase_node(node)
        elif source is not None:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        elif node.target in _CASTS:
            node.target, node.args, node.kwargs = (
                aten._to_copy.default,
                node.args[:1],
                {"dtype": node.meta["val"].dtype},
            )
        elif node.target is aten.masked_fill_.Scalar and _is_fresh(node.args[0]):
            node.target = aten.masked_fill.Scalar
        elif node.target is aten.pad.default and node.args[2:] in (
            (),
            ("constant",),
            ("constant", None),
            ("constant", 0.0),
        ):
            node.target, node.args = aten.constant_pad_nd.default, node.args[:2]
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return all(
        str(node.target) in _DIRECT and not _mixes_types(node) for node in graph.nodes if node.op == "call_function"
    )


def capture_with_symbols(module: nn.Module, inputs: Sequence[TensorSpec], multiple: int) -> ExportedProgram:
    """The network as a graph of ATen operators with symbols for open dimensions. Weights are shared, not copied."""
    dims = {
        "batch": (1, Dim("batch", min=1, max=MAX_BATCH)),
        "height": (multiple, Dim("rows", min=1, max=4096)),
        "width": (multiple, Dim("columns", min=1, max=4096)),
        "tokens": (1, Dim("tokens", min=1, max=4096)),
    }

    def dim(axis: str) -> Any:
        times, symbol = dims[axis_name(axis)]
        times = scaled(times, axis)
        return times * symbol if times > 1 else symbol

    shapes = tuple(
        {index: dim(axis) for index, axis in enumerate(spec.axes) if axis is not None} or None for spec in inputs
    )
    kinds = {parameter.kind for parameter in signature(module.forward).parameters.values()}
    dynamic = (shapes,) if Parameter.VAR_POSITIONAL in kinds else shapes
    arguments = tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in inputs)
    patch = _fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with _quiet(), torch.no_grad(), patch:
        return torch.export.export(module, arguments, dynamic_shapes=dynamic, strict=False)


def capture(module: nn.Module, inputs: Sequence[TensorSpec], shapes: Sequence[tuple[int, ...]]) -> ExportedProgram:
    """The network at exactly these input shapes. Nothing is computed, so the shapes may be of any size."""
    with _quiet(), torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            arguments = tuple(
                torch.empty(shape, dtype=getattr(torch, spec.dtype)) for spec, shape in zip(inputs, shapes, strict=True)
            )
        return torch.export.export(module, arguments, strict=False)


def convert(
    program: ExportedProgram, module: nn.Module, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], opset: int
) -> Model:
    """The ONNX graph with the component's names, optimised, its weights still those of `module`, or in their file."""
    is_direct = make_lean(program)
    if is_direct:
        program.run_decompositions = lambda *args, **kwargs: program
    with _quiet(), torch.no_grad(), _without_repeated_work(skip_promotion=is_direct):
        onnx_program = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=opset,
            optimize=False,
            verbose=False,
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
        )
    if onnx_program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    for value, spec in zip(onnx_program.model.graph.inputs, inputs, strict=True):
        value.metadata_props["pkg.torch.onnx.original_node_name"] = spec.name
    read_when_written(onnx_program.model, module)
    optimize(onnx_program.model, infer_shapes=opset < WHOLE_ATTENTION_OPSET)
    return onnx_program.model


def trace(
    component: Component,
    module: nn.Module,
    config: Config,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    opset: int,
) -> Model:
    """`module` (see `wrappers.wrap`) as an ONNX graph with open dimensions; the shapes of `inputs` are examples."""
    multiple = component.size_multiple(config)
    names = list(dict.fromkeys(axis_name(axis) for spec in inputs for axis in spec.axes if axis is not None))
    try:
        fixed_sizes = _fixed_sizes(module, inputs)
        axes = choose_axes(names, multiple, fixed_sizes)
        model = convert(capture(module, inputs, [sized(spec, axes) for spec in inputs]), module, inputs, outputs, opset)
        open_dimensions(model, inputs, outputs, axes, fixed_sizes)
    except CannotOpen:
        model = convert(capture_with_symbols(module, inputs, multiple), module, inputs, outputs, opset)
        name_dimensions(model, inputs, outputs)
    return model


def _fixed_sizes(module: nn.Module, inputs: Sequence[TensorSpec]) -> set[int]:
    weights = (size for tensor in (*module.parameters(), *module.buffers()) for size in tensor.shape)
    fixed = (size for spec in inputs for size, axis in zip(spec.shape, spec.axes, strict=True) if axis is None)
    return {*weights, *fixed}
