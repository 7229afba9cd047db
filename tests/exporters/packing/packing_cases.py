"""Random quantized weights, and ways to run the ONNX that decodes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx.reference import ReferenceEvaluator

from qgraph.config import QuantSpec, SparsitySpec
from qgraph.ops.groups import Groups
from qgraph.ops.quantized import Quantized
from qgraph.ops.sparsity import sparsity_mask

BITS = (1, 1.58, 2, 3, 4, 5, 6, 7, 8)
SPARSITIES = ("2:4", "1:8", "3:7", "4:16", "2:32", "70%", "96%", "60%[4x4]", "70%[3x5]")
LEVELS = (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)


def make_weight(
    bits: float | None,
    shape: tuple[int, ...],
    *,
    scheme: str | None = None,
    sparsity: str | None = None,
    axis: int = 0,
    group: str | int = "channel",
    seed: int = 0,
) -> Quantized:
    """A weight of random codes, pruned as said; `group` is "channel", "tensor" or a block length."""
    random = torch.Generator().manual_seed(seed)
    sparse = SparsitySpec.parse(sparsity) if sparsity else None
    spec = None
    if bits is not None:
        block = group if isinstance(group, int) else None
        granularity = "block" if block else group
        scheme = "linear" if sparse or bits == 1.58 else scheme
        spec = QuantSpec(bits, scheme, granularity, block)  # type: ignore[arg-type]
    groups = Groups.for_weight(spec, axis)
    kept = (
        torch.ones(shape, dtype=torch.bool)
        if sparse is None
        else sparsity_mask(torch.randn(shape, generator=random), sparse, groups)
    )
    if spec is None:
        return Quantized(None, None, None, groups, None, True, torch.randn(shape, generator=random) * kept)
    low, high = spec.levels
    codes = torch.randint(low, high + 1, shape, generator=random)
    if bits == 1 and spec.scheme == "linear":
        codes = torch.where(codes < 0, -1, 1)
    parameters = groups.shape(shape)
    scale = torch.rand(parameters, generator=random) + 0.1
    zero = torch.randn(parameters, generator=random) if spec.scheme == "affine" else None
    return Quantized((codes * kept).short(), scale, zero, groups, spec, sparse is not None)


def same(a: Quantized, b: Quantized) -> bool:
    """Equal in everything that is deployed."""
    pairs = ((a.codes, b.codes), (a.values, b.values), (a.scale, b.scale), (a.zero_point, b.zero_point))
    tensors = all((x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in pairs)
    return tensors and (a.groups, a.spec, a.sparse) == (b.groups, b.spec, b.sparse)


def run_everywhere(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[list[np.ndarray]]:
    """Outputs of onnxruntime without and with its optimizer, and of onnx.reference (core operators only)."""
    results = [session(model, level).run(None, inputs) for level in LEVELS]
    if not any(node.domain for node in model.graph.node):
        results.append(ReferenceEvaluator(model).run(None, inputs))
    return results


def session(
    model: onnx.ModelProto, level: ort.GraphOptimizationLevel, save: Path | None = None
) -> ort.InferenceSession:
    """A quiet session on one thread; the optimized graph goes to `save`."""
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if save is not None:
        options.optimized_model_filepath = str(save)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def folded(model: onnx.ModelProto, path: Path, level: ort.GraphOptimizationLevel | None = None) -> list[str]:
    """The operators that onnxruntime has left to run once the file is loaded."""
    session(model, level or ort.GraphOptimizationLevel.ORT_ENABLE_BASIC, path)
    return [node.op_type for node in onnx.load(str(path)).graph.node]
