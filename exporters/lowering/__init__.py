"""From a frozen site to ONNX nodes: `graph.lower` replaces every stand-in node of a traced graph."""
