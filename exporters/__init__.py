"""From a prepared model to a packed ONNX file."""
