"""Which layers of a UNet go into 8 bits, and what each precision is: data.

What stays in half precision is what NVIDIA's published recipes leave there (Model-Optimizer's diffusers example,
demoDiffusion): what every block depends on and costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir


@dataclass(frozen=True, kw_only=True)
class Precision:
    """An 8-bit type. `largest` is its largest number; `alpha` how much of the activations' spread SmoothQuant moves into
    the weights (0: none); `percentile` of |x| that a convolution's range holds (100: the absolute maximum)."""

    name: str
    dtype: ir.DataType
    largest: float
    alpha: float
    percentile: float


PRECISIONS = {
    one.name: one
    for one in (
        Precision(name="int8", dtype=ir.DataType.INT8, largest=127.0, alpha=0.8, percentile=99.999),
        Precision(name="fp8", dtype=ir.DataType.FLOAT8E4M3FN, largest=448.0, alpha=0.0, percentile=100.0),
    )
}
KEEP = {
    "time_embedding.*": "one vector a call, from which all of time is read",
    "add_embedding.*": "the same for sizes and pooled text",
    "time_proj*": "the same",
    "*.time_emb_proj": "one row a picture: no time to win",
    "conv_in": "4 channels, of the latent itself",
    "conv_out": "noise_pred itself",
    "*.conv_shortcut": "carries the residual stream, which has the widest range",
    "*.proj_out": "reads the residual stream of a transformer",
}
"""Patterns of layers that stay in half precision, and why."""
PREFIX, SUFFIX = "unet.", ".weight"


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer in the graph. `name` is its module's path in the network; `weight` has its output
    channels first and its input channels second."""

    name: str
    node: ir.Node
    weight: ir.Value

    @property
    def input(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def is_linear(self) -> bool:
        return self.node.op_type != "Conv"


def is_kept(name: str, more: Sequence[str] = ()) -> bool:
    """Whether a layer stays in half precision, by `KEEP` and by `more` patterns."""
    return any(fnmatchcase(name, pattern) for pattern in (*KEEP, *more))


def find_layers(graph: ir.Graph, keep: Sequence[str] = ()) -> list[Layer]:
    """The layers of an exported UNet that may go into 8 bits, in the order of the graph."""
    layers = []
    for node in graph:
        if node.op_type not in ("Conv", "MatMul", "Gemm"):
            continue
        weight = node.inputs[1]
        producer = weight.producer() if weight is not None else None
        if producer is not None and producer.op_type == "Transpose":  # a linear layer's weight, as torch keeps it
            weight = producer.inputs[0]
        name = str(weight.name) if weight is not None and weight.is_initializer() else ""
        if weight is None or not (name.startswith(PREFIX) and name.endswith(SUFFIX)):
            continue
        layer = Layer(name.removeprefix(PREFIX).removesuffix(SUFFIX), node, weight)
        if not is_kept(layer.name, keep):
            layers.append(layer)
    return layers
