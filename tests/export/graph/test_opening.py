from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from export.components import TensorSpec
from export.graph.opening import CannotOpen, choose_axes, open_dimensions, sized

INPUT = TensorSpec("x", "float32", (2, 6, 8, 8), ("batch", None, "height", "width"))


def graph_of(
    nodes: list[tuple[str, dict]], constants: dict[str, list[int]], axes: list, out_shape: list[int]
) -> ir.Model:
    """A chain of nodes on x traced at the sizes of `axes`; each takes the constant that follows it in `constants`."""
    value = ir.Value(name="x", shape=ir.Shape(sized(INPUT, axes)), type=ir.TensorType(ir.DataType.FLOAT))
    initializers, made, current = [], [], value
    for (kind, attributes), (name, numbers) in zip(nodes, constants.items(), strict=True):
        constant = ir.Value(name=name, shape=ir.Shape([len(numbers)]), type=ir.TensorType(ir.DataType.INT64))
        constant.const_value = ir.tensor(np.array(numbers, dtype=np.int64), name=name)
        initializers.append(constant)
        node = ir.node(kind, [current, constant], attributes)
        node.outputs[0].name, node.name = f"{name}_out", f"{name}_node"
        made.append(node)
        current = node.outputs[0]
        current.type = ir.TensorType(ir.DataType.FLOAT)
    current.shape = ir.Shape(out_shape)
    graph = ir.Graph([value], [current], nodes=made, initializers=initializers, opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


def test_primes_divide_no_fixed_size() -> None:
    axes = choose_axes(["batch", "height"], 4, [131 * 5, 137, 320])
    assert [axis.prime for axis in axes] == [139, 149]
    assert axes[0].size == 139 and axes[1].size == 4 * 149
    with pytest.raises(CannotOpen, match="no primes"):
        choose_axes(["batch", "height"], 4, [math.prod(range(1, 230))])


def test_a_reshape_is_opened_for_every_size() -> None:
    axes = choose_axes(["batch", "height", "width"], 4, [6])
    batch, height, width = (axis.size for axis in axes)
    model = graph_of(
        [("Reshape", {}), ("Reshape", {})],
        {"tokens": [batch, 6, height * width], "back": [batch, 3, height, 2 * width]},
        axes,
        [batch, 3, height, 2 * width],
    )
    outputs = [TensorSpec("y", "float32", (2, 3, 8, 16), ("batch", None, "height", "width"))]
    open_dimensions(model, [INPUT], outputs, axes, [6])
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    for shape in ((1, 6, 4, 12), (5, 6, 8, 4)):
        [y] = session.run(None, {"x": np.arange(np.prod(shape), dtype=np.float32).reshape(shape)})
        assert y.shape == (shape[0], 3, shape[2], 2 * shape[3])
        assert (y.ravel() == np.arange(y.size)).all()


def added(array: np.ndarray, axes: list) -> ir.Model:
    """x + a constant of the size the exporter folded it to."""
    value = ir.Value(name="x", shape=ir.Shape(sized(INPUT, axes)), type=ir.TensorType(ir.DataType.INT64))
    constant = ir.Value(name="folded", shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.INT64))
    constant.const_value = ir.tensor(array, name="folded")
    node = ir.node("Add", [value, constant])
    [out] = node.outputs
    out.name, out.shape, out.type = "y", ir.Shape(sized(INPUT, axes)), value.type
    graph = ir.Graph([value], [out], nodes=[node], initializers=[constant], opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("kind", ["counts a column", "counts a row", "repeats"])
def test_a_folded_constant_is_opened_for_every_size(kind: str) -> None:
    axes = choose_axes(["batch", "height", "width"], 4, [6])
    height, width = axes[1].size, axes[2].size
    array = {
        "counts a column": np.arange(height)[:, None],
        "counts a row": np.arange(width),
        "repeats": np.tile(np.array([7, 3, 1, 0, 5, 9])[:, None, None], (1, height, width)),
    }[kind]
    model = added(array, axes)
    open_dimensions(model, [INPUT], [INPUT], axes, [6])
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    for shape in ((1, 6, 4, 12), (5, 6, 8, 4)):
        [y] = session.run(None, {"x": np.zeros(shape, dtype=np.int64)})
        here = tuple(slice(size) for size in shape[-array.ndim :])
        assert (y == np.broadcast_to(array[here], shape)).all()


def test_a_constant_that_neither_counts_nor_repeats_is_refused() -> None:
    axes = choose_axes(["batch", "height", "width"], 4, [6])
    with pytest.raises(CannotOpen, match="folded"):
        open_dimensions(added(np.arange(axes[2].size) ** 2, axes), [INPUT], [INPUT], axes, [6])


def test_a_sum_of_sizes_is_refused() -> None:
    axes = choose_axes(["batch", "height", "width"], 4, [6])
    batch, height, width = (axis.size for axis in axes)
    padded = height + 1  # as a padding convolution makes
    model = graph_of([("Reshape", {})], {"tokens": [batch, 6, padded, width]}, axes, [batch, 6, padded, width])
    with pytest.raises(CannotOpen, match=str(padded)):
        open_dimensions(model, [INPUT], [INPUT], axes, [6])


def test_a_size_in_another_place_than_a_shape_is_refused() -> None:
    axes = choose_axes(["batch", "height", "width"], 4, [6])
    shape = list(sized(INPUT, axes))
    model = graph_of([("Tile", {})], {"repeats": [1, 1, shape[2], 1]}, axes, shape)
    with pytest.raises(CannotOpen, match="Tile"):
        open_dimensions(model, [INPUT], [INPUT], axes, [6])
