"""Opens the dimensions of a graph that was traced with fixed sizes, which is several times quicker than symbols.

The trick is to trace with sizes that cannot be mistaken: batch, height, width and, where they are open, the tokens of a
prompt are made of primes that divide no dimension of any weight. Every size in these networks is a product (no sums),
so in the traced graph a number shows by its factors which axes it is made of: 137 · 2 · 131 is columns times twice the
rows. Such numbers may stand in two kinds of places only, the target of a Reshape or an Expand. There a size is kept by
reference (0: as the input has it, -1: what is left), or computed once from the input's shape. A constant of such a size
was folded from an Expand, and repeats itself, or from an arange, and counts: it becomes that operator again. A number
anywhere else means that the network does something with sizes that this cannot express: `CannotOpen`, and the caller
traces with symbols.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import gcd

import numpy as np
import onnx_ir as ir

from distill.models.conditioning import TensorSpec

_PRIMES = (131, 137, 139, 149, 151, 157, 163, 167, 173, 179, 181, 191, 193, 197, 199, 211, 223, 227, 229, 233)
"""Not 127: it divides the largest int64, which in a Slice means "to the end"."""


class CannotOpen(Exception):
    """The graph uses a size in a place where it cannot be left open."""


@dataclass(frozen=True)
class Axis:
    """An open axis: its size is `multiple` · a whole number, which is `prime` in the traced graph."""

    name: str
    prime: int
    multiple: int

    @property
    def size(self) -> int:
        return self.prime * self.multiple


def choose_axes(names: Iterable[str], multiple: int, fixed_sizes: Iterable[int]) -> list[Axis]:
    """An axis for each name, with primes that divide none of `fixed_sizes`; height and width must be multiples of
    `multiple`, the others may be any number."""
    fixed = {size for size in fixed_sizes if size}
    primes = iter([prime for prime in _PRIMES if all(size % prime for size in fixed)])
    try:
        return [Axis(name, next(primes), multiple if name in ("height", "width") else 1) for name in names]
    except StopIteration:
        raise CannotOpen(f"no primes left beside the sizes {sorted(fixed)}") from None


def sized(spec: TensorSpec, axes: Sequence[Axis]) -> tuple[int, ...]:
    """The shape of an input for tracing."""
    sizes = {axis.name: axis.size for axis in axes}
    return tuple(
        size if axis is None else scaled(sizes[axis_name(axis)], axis)
        for axis, size in zip(spec.axes, spec.shape, strict=True)
    )


def axis_name(axis: str) -> str:
    """`height` of `height`, `8 * height` and `height / 2`."""
    return axis.partition(" / ")[0].rpartition(" * ")[2]


def scaled(size: int, axis: str) -> int:
    """The size of `axis` where `size` is that of its `axis_name`."""
    if " / " in axis:
        return size // int(axis.partition(" / ")[2])
    return int(axis.partition(" * ")[0]) * size if " * " in axis else size


@dataclass
class _Opener:
    graph: ir.Graph
    axes: Sequence[Axis]
    fixed_sizes: frozenset[int]
    new_nodes: list[ir.Node] = field(default_factory=list)
    values: dict[object, ir.Value] = field(default_factory=dict)

    def factors(self, size: int) -> tuple[int, tuple[int, ...]]:
        """`size` as coefficient · product of the primes to these powers."""
        powers = []
        for axis in self.axes:
            power = 0
            while size and size % axis.prime == 0:
                size, power = size // axis.prime, power + 1
            powers.append(power)
        return size, tuple(powers)

    def check(self, size: int) -> None:
        """Raises CannotOpen where `size` cannot be a product of axes and fixed sizes: it must be a sum, as of padding."""
        rest = self.factors(max(size, 1))[0]
        for fixed in self.fixed_sizes:
            while (common := gcd(rest, fixed)) > 1:
                rest //= common
        if rest > 1:
            raise CannotOpen(f"the size {size} is no product of axes and of fixed sizes")

    def is_open(self, size: int) -> bool:
        return any(self.factors(size)[1])

    def expression(self, size: int) -> int | str:
        """`size` as it reads in the open graph: itself, or a product of axis names, such as 8 * height. Between spaces,
        as optimum, which reads the sizes of outputs so, wants it."""
        coefficient, powers = self.factors(size)
        words = []
        for axis, power in zip(self.axes, powers, strict=True):
            for _ in range(power):
                common = gcd(coefficient, axis.multiple)
                coefficient //= common
                words.append(axis.name if common == axis.multiple else f"{axis.name} / {axis.multiple // common}")
        if not words:
            return size
        return " * ".join(([str(coefficient)] if coefficient != 1 else []) + words)

    def _constant(self, numbers: Sequence[int]) -> ir.Value:
        name = "sizes_" + "_".join(map(str, numbers)).replace("-", "m")
        return self._initializer(name, np.array(numbers, dtype=np.int64))

    def _initializer(self, name: str, array: np.ndarray) -> ir.Value:
        """A constant; each `name` once."""
        if name not in self.values:
            tensor = ir.tensor(array, name=name)
            value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
            value.const_value = tensor
            self.graph.register_initializer(value)
            self.values[name] = value
        return self.values[name]

    def _node(
        self,
        key: object,
        kind: str,
        inputs: list[ir.Value],
        shape: Sequence[int] = (1,),
        dtype: ir.DataType = ir.DataType.INT64,
        **attributes: int,
    ) -> ir.Value:
        """One tensor computed at the start of the graph; each `key` once."""
        if key not in self.values:
            node = ir.node(kind, inputs, attributes or None)
            node.name = f"size_node_{len(self.new_nodes)}"
            [output] = node.outputs
            output.name = f"size_{len(self.new_nodes)}"
            output.shape, output.type = ir.Shape(shape), ir.TensorType(dtype)
            self.new_nodes.append(node)
            self.values[key] = output
        return self.values[key]

    def _axis(self, axis: Axis) -> ir.Value:
        """The size of an axis, read from the first input that has it."""
        for value in self.graph.inputs:
            for index, size in enumerate(value.shape or ()):
                if size == axis.size:
                    return self._node(axis.name, "Shape", [value], start=index, end=index + 1)
        raise CannotOpen(f"no input has the axis {axis.name}")

    def computed(self, size: int) -> ir.Value:
        """A size as a vector of one element."""
        coefficient, powers = self.factors(size)
        terms = []
        for axis, power in zip(self.axes, powers, strict=True):
            for _ in range(power):
                whole, common = self._axis(axis), gcd(coefficient, axis.multiple)
                coefficient, divisor = coefficient // common, axis.multiple // common
                key = (axis.name, divisor)
                terms.append(self._node(key, "Div", [whole, self._constant([divisor])]) if divisor > 1 else whole)
        if coefficient != 1 or not terms:
            terms.append(self._constant([coefficient]))
        result = terms[0]
        for term in terms[1:]:
            result = self._node((result.name, "*", term.name), "Mul", [result, term])
        return result

    def vector(self, entries: Sequence[int | ir.Value]) -> ir.Value:
        """A shape of literal numbers and computed sizes."""
        if all(isinstance(entry, int) for entry in entries):
            return self._constant([entry for entry in entries if isinstance(entry, int)])
        parts = [self._constant([entry]) if isinstance(entry, int) else entry for entry in entries]
        key = ("vector", *(part.name for part in parts))
        return self._node(key, "Concat", parts, [len(parts)], axis=0) if len(parts) > 1 else parts[0]

    def reshape_target(self, data: Sequence[int], target: Sequence[int]) -> ir.Value:
        entries: list[int | ir.Value] = []
        unresolved = []
        for index, size in enumerate(target):
            if not self.is_open(size):
                entries.append(size)
            elif index < len(data) and data[index] == size:
                entries.append(0)
            else:
                unresolved.append(index)
                entries.append(size)
        if unresolved:  # one size is what is left over; of two, the one that is harder to compute
            left_over = max(unresolved, key=lambda index: (sum(self.factors(target[index])[1]), index))
            for index in unresolved:
                entries[index] = -1 if index == left_over else self.computed(target[index])
        return self.vector(entries)

    def expand_target(self, data: Sequence[int], target: Sequence[int]) -> ir.Value:
        padded = [1] * (len(target) - len(data)) + list(data)
        return self.vector(
            [
                size if not self.is_open(size) else 1 if size == old else self.computed(size)
                for size, old in zip(target, padded, strict=True)
            ]
        )

    def unfolded(self, constant: ir.Value) -> ir.Value:
        """A constant of an open shape as what it was folded from."""
        assert constant.const_value is not None
        name, array = str(constant.name), constant.const_value.numpy()
        once = array[tuple(slice(1) if self.is_open(size) else slice(None) for size in array.shape)]
        if (array == once).all():
            target = self.expand_target(once.shape, array.shape)
            part = self._initializer(f"{name}_once", once)
            return self._node(name, "Expand", [part, target], array.shape, constant.const_value.dtype)
        if array.dtype == np.int64 and (array.ravel() == np.arange(array.size)).all():
            start, step = (self._initializer(f"number_{number}", np.array(number)) for number in (0, 1))
            end = self._node((name, "end"), "Squeeze", [self.computed(array.size)], ())
            count = self._node((name, "count"), "Range", [start, end, step], [array.size])
            if array.ndim == 1:
                return count
            target = self.reshape_target([array.size], array.shape)
            return self._node(name, "Reshape", [count, target], array.shape)
        raise CannotOpen(f"the constant {name} has an open shape {list(array.shape)}")


def _ints(value: ir.Value | None) -> list[int]:
    """The numbers of a small integer constant; nothing for any other value."""
    constant = value.const_value if value is not None else None
    if constant is None or constant.dtype not in (ir.DataType.INT64, ir.DataType.INT32) or constant.size > 4096:
        return []
    return [int(number) for number in constant.numpy().ravel()]


def _known_shape(value: ir.Value | None) -> list[int]:
    """The shape where it is known in numbers, else nothing."""
    shape = value.shape if value is not None else None
    return [size for size in shape if isinstance(size, int)] if shape is not None and shape.is_static() else []


def open_dimensions(
    model: ir.Model,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    axes: Sequence[Axis],
    fixed_sizes: Iterable[int],
) -> None:
    """Rewrites, in place, a graph traced with inputs of the shapes `sized`. Raises CannotOpen."""
    graph = model.graph
    opener = _Opener(graph, axes, frozenset(size for size in fixed_sizes if size > 1))
    nodes = list(graph)
    for initializer in list(graph.initializers.values()):
        if any(map(opener.is_open, _known_shape(initializer))):
            ir.convenience.replace_all_uses_with(initializer, opener.unfolded(initializer))
    rewrites: list[tuple[ir.Node, list[int], list[int]]] = []
    for node in nodes:
        for attribute in node.attributes.values():
            numbers = attribute.value if attribute.type == ir.AttributeType.INTS else [attribute.value]
            if attribute.type in (ir.AttributeType.INT, ir.AttributeType.INTS) and any(map(opener.is_open, numbers)):
                raise CannotOpen(f"{node.op_type} {node.name} has the attribute {attribute}")
        for index, value in enumerate(node.inputs):
            numbers = _ints(value)
            is_target = node.op_type in ("Reshape", "Expand") and index == 1
            if is_target:
                for number in numbers:
                    opener.check(number)
            if not any(map(opener.is_open, numbers)):
                continue
            if not is_target:
                raise CannotOpen(f"{node.op_type} {node.name} takes the size {numbers}")
            if -1 in numbers and not _known_shape(node.outputs[0]):
                raise CannotOpen(f"{node.op_type} {node.name} leaves a size over in an unknown shape")
            rewrites.append((node, _known_shape(node.inputs[0]), _known_shape(node.outputs[0]) or numbers))
    for node, data, target in rewrites:
        make = opener.reshape_target if node.op_type == "Reshape" else opener.expand_target
        node.attributes.pop("allowzero", None)
        node.replace_input_with(1, make(data, target))
    for value, spec in [*zip(graph.inputs, inputs, strict=True), *zip(graph.outputs, outputs, strict=True)]:
        value.shape = ir.Shape([opener.expression(size) for size in _known_shape(value)])
        if [axis is not None for axis in spec.axes] != [isinstance(size, ir.SymbolicDim) for size in value.shape]:
            raise CannotOpen(f"{spec.name} has the shape {value.shape}, not {spec.axes}")
    outside = {id(value) for value in graph.outputs}
    traced = [output for node in nodes for output in node.outputs if id(output) not in outside]
    made = [output for node in opener.new_nodes for output in node.outputs]
    for value in [*traced, *(value for value in made if any(map(opener.is_open, _known_shape(value))))]:
        value.shape = None  # sizes that are sums cannot be told from fixed ones; every reader infers shapes anyway
    graph.insert_before(nodes[0], opener.new_nodes)
    for value in [value for value in graph.initializers.values() if not value.uses() and not value.is_graph_output()]:
        graph.initializers.pop(str(value.name))
