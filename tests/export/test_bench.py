from __future__ import annotations

import shutil
from pathlib import Path

import onnx

from export.bench import unet_latency


def test_latency_is_measured_on_a_graph_whose_timestep_is_a_scalar(
    mini_vega: Path, onnx_fp32: Path, tmp_path: Path
) -> None:
    """As optimum's is."""
    ours = onnx_fp32 / "unet"
    model = onnx.load(ours / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        node.input[:] = ["timestep_vector" if name == "timestep" else name for name in node.input]
    [timestep] = [value for value in model.graph.input if value.name == "timestep"]
    timestep.type.tensor_type.shape.ClearField("dim")
    model.graph.initializer.append(onnx.helper.make_tensor("first", onnx.TensorProto.INT64, [1], [0]))
    model.graph.node.insert(0, onnx.helper.make_node("Unsqueeze", ["timestep", "first"], ["timestep_vector"]))
    theirs = tmp_path / "unet"
    theirs.mkdir()
    onnx.save(model, theirs / "model.onnx")
    shutil.copyfile(ours / "model.onnx.data", theirs / "model.onnx.data")
    times = unet_latency({"ours": onnx_fp32, "optimum": tmp_path}, mini_vega, 1)
    assert {name: len(values) for name, values in times.items()} == {"ours": 1, "optimum": 1}
