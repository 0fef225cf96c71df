"""From a network to an ONNX graph: torch.export, then torch.onnx.export(dynamo=True), without detours.

The exporter traces the captured program once more to decompose it, although every operator of these networks has a
direct ONNX translation. With open dimensions that second tracing costs more than the first. So the program is made
lean here (asserts and operators that do nothing in inference go) and, where nothing is left that needs
decomposition, is handed over as it is. A program with any other operator takes the exporter's own way.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from onnx_ir import Model
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from export.components import COMPONENTS, Component, Config, TensorSpec
from export.graph import name_dimensions, optimize
from export.wrappers import example

aten = torch.ops.aten
MAX_BATCH = 63
"""diffusers' upsampler takes another way from 64 on; a guidance batch of 31 images is enough."""

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
        *(aten.squeeze.dim, aten.select.int, aten.constant_pad_nd.default, aten.arange.default),
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


def _dynamic_shapes(specs: list[TensorSpec], multiple: int) -> tuple[dict[int, Any] | None, ...]:
    dims = {
        "batch": Dim("batch", min=1, max=MAX_BATCH),
        "height": multiple * Dim("rows", min=1, max=4096),
        "width": multiple * Dim("columns", min=1, max=4096),
    }
    return tuple(
        {index: dims[axis] for index, axis in enumerate(spec.axes) if axis is not None} or None for spec in specs
    )


def _replacement(node: Node) -> Node | None:
    """The input that `node` merely passes on in inference, if it does."""
    source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if source is None:
        return None
    if node.target in (aten.contiguous.default, aten.alias.default, aten.detach_.default, aten.detach.default):
        return source
    if node.target is aten.dropout.default and not node.args[2]:
        return source
    is_cast = node.target in (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default)
    return source if is_cast and node.meta["val"].dtype == source.meta["val"].dtype else None


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
        elif node.target in (aten.to.dtype, aten.to.dtype_layout):
            node.target, node.args, node.kwargs = (
                aten._to_copy.default,
                node.args[:1],
                {"dtype": node.meta["val"].dtype},
            )
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return all(str(node.target) in _DIRECT for node in graph.nodes if node.op == "call_function")


def capture(module: nn.Module, inputs: list[TensorSpec], multiple: int, *, dynamic: bool) -> ExportedProgram:
    """The network as a graph of ATen operators. Its weights are shared with `module`, not copied."""
    shapes = _dynamic_shapes(inputs, multiple) if dynamic else None
    arguments = tuple(example(spec.dtype, spec.shape) for spec in inputs)
    patch: Callable[..., Any] = torch.fx.experimental._config.patch  # type: ignore[attr-defined]
    with _quiet(), torch.no_grad(), patch(backed_size_oblivious=True):
        return torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)


def convert(program: ExportedProgram, inputs: list[TensorSpec], outputs: list[TensorSpec], opset: int) -> Model:
    """The ONNX graph with the component's names, optimised, its weights still those of the program."""
    if make_lean(program):
        program.run_decompositions = lambda *args, **kwargs: program  # type: ignore[method-assign]
    with _quiet(), torch.no_grad():
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
    model = onnx_program.model
    optimize(model)
    name_dimensions(model, inputs, outputs)
    return model


def trace(
    component: Component | str,
    module: nn.Module,
    config: Config,
    inputs: list[TensorSpec],
    outputs: list[TensorSpec],
    *,
    opset: int,
    dynamic: bool,
) -> Model:
    """`module` (see `wrappers.wrap`) as an ONNX graph. The shapes of `inputs` are examples where `dynamic`, else exact."""
    component = COMPONENTS[component] if isinstance(component, str) else component
    program = capture(module, inputs, component.size_multiple(config), dynamic=dynamic)
    return convert(program, inputs, outputs, opset)
