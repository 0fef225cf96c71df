"""From a component's network to its ONNX graph."""
