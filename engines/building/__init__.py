"""From an ONNX folder to a bundle of engines."""
