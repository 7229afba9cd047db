"""Other runtimes than onnxruntime, those that are installed: `pip install 'qgraph[runtimes]'`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
from onnx.reference import ReferenceEvaluator

Run = Callable[[Path, np.ndarray], list[np.ndarray]]


def _reference(path: Path, x: np.ndarray) -> list[np.ndarray]:
    evaluator = ReferenceEvaluator(str(path))
    return evaluator.run(None, {evaluator.input_names[0]: x})


def _openvino(path: Path, x: np.ndarray) -> list[np.ndarray]:
    import openvino

    # Left to itself it computes in bfloat16 where the processor has that, and, where any activation of the file is
    # static, rounds the zero points of all weights.
    exact = {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": "NO"}
    model = openvino.Core().compile_model(str(path), "CPU", exact)
    found = model(x)
    return [found[output] for output in model.outputs]


def _tract(path: Path, x: np.ndarray) -> list[np.ndarray]:
    import tract

    return [output.to_numpy() for output in tract.onnx().load(path).into_model().into_runnable().run([x])]


RUNTIMES: dict[str, Run] = {"onnx": _reference, "openvino": _openvino, "tract": _tract}
INSTALLED = {name: run for name, run in RUNTIMES.items() if importlib.util.find_spec(name) is not None}
