"""Step time of a peer's quantization-aware training over FP32, measured in the peer's own environment.

benchmarks/training.py makes that environment and runs this file in it; it imports nothing of qgraph and prints JSON.

    python benchmarks/training_peers.py torchao gpt [--rounds 7] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from training_models import MODELS, Step


def torchao_weights(model: nn.Module) -> nn.Module:
    """Weights at 4 bits in groups of 128."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    weight = IntxFakeQuantizeConfig(torch.int4, group_size=128)
    quantize_(model, QATConfig(weight_config=weight, step="prepare"))
    return model


def torchao_both(model: nn.Module) -> nn.Module:
    """The same, and activations at 8 bits, a scale a token."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weight = IntxFakeQuantizeConfig(torch.int4, group_size=128)
    quantize_(model, QATConfig(activation_config=activation, weight_config=weight, step="prepare"))
    return model


def brevitas_weights(model: nn.Module) -> nn.Module:
    """Weights of Linear and Conv2d layers at 4 bits, a scale a channel."""
    return _brevitas(model, activations=False)


def brevitas_both(model: nn.Module) -> nn.Module:
    """The same, and activations at 8 bits, a scale a tensor."""
    return _brevitas(model, activations=True)


def _brevitas(model: nn.Module, activations: bool, bits: int = 4) -> nn.Module:
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    options = {"weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": bits}
    if activations:
        options["input_quant"] = Int8ActPerTensorFloat
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            made = None
            if type(child) is nn.Linear:
                made = qnn.QuantLinear(child.in_features, child.out_features, child.bias is not None, **options)
            elif type(child) is nn.Conv2d:
                sizes = (child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding)
                made = qnn.QuantConv2d(*sizes, bias=child.bias is not None, **options)
            if made is not None:
                made.load_state_dict(child.state_dict(), strict=False)
                setattr(parent, name, made)
    return model


PEERS: dict[str, dict[str, Callable[[nn.Module], nn.Module]]] = {
    "torchao": {"W4@128": torchao_weights, "A8W4@128": torchao_both},
    "brevitas": {"W4": brevitas_weights, "A8W4": brevitas_both},
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps, skipped = {"FP32": Step(*MODELS[options.model]())}, {}
    for name, quantized in PEERS[options.peer].items():
        model, inputs, targets = MODELS[options.model]()
        try:
            step = Step(quantized(model), inputs, targets)
            step()
        except Exception as error:  # whatever a release of the peer cannot do is told, not hidden
            skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            steps[name] = step
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    medians = {name: statistics.median(found) for name, found in times.items()}
    ratios = {name: value / medians["FP32"] for name, value in medians.items() if name != "FP32"}
    print(json.dumps({"ratios": ratios, "skipped": skipped}))


if __name__ == "__main__":
    main()
