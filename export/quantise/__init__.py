"""From an ONNX folder to the same folder with its UNet in 8 bits."""
