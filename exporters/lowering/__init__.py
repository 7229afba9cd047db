"""From a frozen site to ONNX nodes."""
