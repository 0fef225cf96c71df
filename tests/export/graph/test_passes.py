"""Passes over a graph."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from export.graph.passes import optimize


def test_equal_constants_become_one_and_equal_weights_stay_apart() -> None:
    """Weights that are equal by chance (biases of zero, before training) must be open to a refit each by itself."""
    model = ir.from_proto(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["": 18]> net (float[2] x) => (float[2] out)
            <float[2] first_bias = {0, 0}, float[2] second_bias = {0, 0}> {
                a = Add(x, first_bias)
                two = Constant<value: tensor = float[2] {2, 2}>()
                b = Mul(a, two)
                c = Add(b, second_bias)
                also_two = Constant<value: tensor = float[2] {2, 2}>()
                out = Mul(c, also_two)
            }"""
        )
    )
    optimize(model)
    names = set(model.graph.initializers)
    assert names >= {"first_bias", "second_bias"} and len(names) == 3
