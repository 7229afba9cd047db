"""A peer's .onnx file of a model, made in the peer's own environment; prints JSON.

benchmarks/export.py makes that environment and runs this file in it; it imports nothing of qgraph. Beside each file
lies what the quantized torch model computes, as ``<name>.npy``.

    python benchmarks/export_peers.py torchao mlp FOLDER
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from export_models import MODELS, build
from torch import Tensor, nn


def torchao_int8(model: nn.Module, x: Tensor, path: Path) -> nn.Module:
    """Weights at 8 bits, a scale a channel."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return _dynamo(model, x, path)


def torchao_int4(model: nn.Module, x: Tensor, path: Path) -> nn.Module:
    """Weights at 4 bits in groups of 128."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(128)))
    return _dynamo(model, x, path)


def brevitas_4(model: nn.Module, x: Tensor, path: Path) -> nn.Module:
    """Weights of Linear and Conv2d layers at 4 bits, a scale a channel, as QCDQ."""
    return _brevitas(model, x, path, 4, False)


def brevitas_8(model: nn.Module, x: Tensor, path: Path) -> nn.Module:
    """Weights at 8 bits and static activations at 8 bits, as QCDQ."""
    return _brevitas(model, x, path, 8, True)


def _brevitas(model: nn.Module, x: Tensor, path: Path, bits: int, activations: bool) -> nn.Module:
    from brevitas.export import export_onnx_qcdq
    from training_peers import _brevitas as quantized

    made = quantized(model, activations, bits).train()
    with torch.no_grad():
        made(x)  # settles the scales of activations
    made.eval()
    export_onnx_qcdq(made, args=x, export_path=str(path), dynamo=False, **_names())
    return made


def _names() -> dict[str, object]:
    return {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": {0: "batch"}, "y": {0: "batch"}}}


def _dynamo(model: nn.Module, x: Tensor, path: Path) -> nn.Module:
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (x,), str(path), dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False)
    return model


PEERS: dict[str, dict[str, Callable[[nn.Module, Tensor, Path], nn.Module]]] = {
    "torchao": {"W8": torchao_int8, "W4@128": torchao_int4},
    "brevitas": {"W4 QCDQ": brevitas_4, "A8W8 QCDQ": brevitas_8},
}


def main() -> None:
    """Export, and print what became of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    found: dict[str, dict[str, str]] = {}
    for name, write in PEERS[options.peer].items():
        model, x = build(options.model)
        path = options.folder / f"{options.model}-{options.peer}-{name.replace(' ', '_').replace('@', '_')}.onnx"
        try:
            with torch.no_grad():
                expected = write(model, x, path)(x)
        except Exception as error:  # whatever a release of the peer cannot do is told, not hidden
            found[name] = {"skipped": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
        else:
            np.save(path.with_suffix(".npy"), expected.detach().numpy())
            found[name] = {"path": str(path)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
