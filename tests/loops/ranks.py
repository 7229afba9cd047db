"""What each of two processes runs for test_distributed.py; the return values are what the test compares."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import qgraph
from qgraph.modules import WeightQuantizer
from tests.models import GPT

WORLD = 2
STEPS = 20


def tokens(step: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 33, (4, 8), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def share(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """One rank's half of a batch."""
    rows = slice(2 * rank, 2 * rank + 2)
    ids, targets = tokens(step)
    return ids[rows], targets[rows]


def model(config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    prepared = qgraph.prepare(GPT().to(dtype), config, tokens(0))
    return prepared.eval()  # dropout would draw by process


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 1e-2)


def shard(prepared: nn.Module, **options: Any) -> nn.Module:
    for block in prepared.blocks:  # type: ignore[union-attr]
        fully_shard(block["attn"], **options)  # type: ignore[index]
        fully_shard(block["mlp"], **options)  # type: ignore[index]
    return fully_shard(prepared, **options)


def train(wrapped: nn.Module, rank: int, steps: range, optimizer: torch.optim.Optimizer) -> list[float]:
    """Losses of the whole batch, each the mean of the ranks'."""
    losses = []
    for step in steps:
        loss = wrapped(*share(rank, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().double()
        dist.all_reduce(mean)
        losses.append(mean.item() / WORLD)
    return losses


def full(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def parameters(prepared: nn.Module) -> dict[str, Tensor]:
    return {name: full(p.detach()).clone() for name, p in prepared.named_parameters()}


def everything(rank: int, folder: Path, config: Any) -> dict[str, Any]:
    """Every way of splitting a batch."""
    single, double = torch.float32, torch.float64
    return {
        "replicated": replicated(config, rank, single),
        "sharded": sharded(config, rank, single),
        "sharded, float64": sharded(config, rank, double),
        "sharded, mixed": sharded(config, rank, single, mixed=True),
    }


def replicated(config: Any, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """DistributedDataParallel: gradients of the first step, losses of twenty, parameters after them."""
    prepared = model(config, dtype)
    wrapped = DistributedDataParallel(prepared)
    wrapped(*share(rank, 0)).backward()
    gradients = {name: p.grad.clone() for name, p in prepared.named_parameters() if p.grad is not None}
    losses = train(wrapped, rank, range(STEPS), adam(prepared.parameters()))
    return {"gradients": gradients, "losses": losses, "parameters": parameters(prepared)}


def sharded(config: Any, rank: int, dtype: torch.dtype, mixed: bool = False) -> dict[str, Any]:
    """`fully_shard`: the same, and what the weight quantizers were given."""
    prepared = model(config, dtype)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
    wrapped = shard(prepared, mp_policy=policy)
    seen: dict[str, tuple[bool, tuple[int, ...]]] = {}

    def note(quantizer: Any, args: Any, output: Tensor) -> None:
        seen[quantizer.site] = (isinstance(args[0], DTensor), tuple(args[0].shape))

    hooks = [m.register_forward_hook(note) for m in prepared.modules() if isinstance(m, WeightQuantizer)]
    wrapped(*share(rank, 0)).backward()
    for hook in hooks:
        hook.remove()
    gradients = {name: full(p.grad).clone() for name, p in prepared.named_parameters() if p.grad is not None}
    losses = train(wrapped, rank, range(STEPS), adam(prepared.parameters()))
    return {"gradients": gradients, "losses": losses, "parameters": parameters(prepared), "seen": seen}


def split_groups(rank: int, folder: Path, configs: dict[str, Any]) -> dict[str, Any]:
    """Groups that no shard holds whole: of a whole weight (per tensor), with a learned step or without."""
    return {name: sharded(config, rank, torch.float32) for name, config in configs.items()}


def resumed(rank: int, folder: Path, config: Any) -> dict[str, Any]:
    """Six steps; the same cut in two by torch.distributed.checkpoint; the sharded model saved and loaded whole."""
    whole = shard(model(config))
    optimizer = adam(whole.parameters())
    losses = train(whole, rank, range(6), optimizer)

    first = shard(model(config))
    optimizer = adam(first.parameters())
    again = train(first, rank, range(3), optimizer)
    states = get_state_dict(first, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=folder / "dcp")

    torch.manual_seed(7)
    second = shard(qgraph.prepare(GPT().eval(), config, tokens(0)))
    optimizer = adam(second.parameters())
    loaded = dict(zip(("model", "optimizer"), get_state_dict(second, optimizer), strict=True))
    dcp.load(loaded, checkpoint_id=folder / "dcp")
    set_state_dict(second, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    again += train(second, rank, range(3, 6), optimizer)

    qgraph.save(second, folder / "model.safetensors")
    third = shard(model(config))
    before = parameters(third)
    qgraph.load(folder / "model.safetensors", third)
    assert any(not torch.equal(before[name], value) for name, value in parameters(third).items())
    return {
        "losses": (losses, again),
        "parameters": (parameters(whole), parameters(second), parameters(third)),
        "logits": second(tokens(9)[0]).detach(),
    }


def single(config: Any, dtype: torch.dtype, parts: int, mixed: bool = False) -> dict[str, Any]:
    """One process on the whole batch, in `parts` micro-batches; `mixed`: float32 weights, a bfloat16 copy that runs."""
    prepared = model(config, dtype)
    running = copy.deepcopy(prepared).to(torch.bfloat16) if mixed else prepared
    optimizer = adam(prepared.parameters())

    def gradients(step: int) -> float:
        ids, targets = tokens(step)
        losses = []
        optimizer.zero_grad()
        if mixed:
            running.load_state_dict(prepared.state_dict())
        for part in range(parts):
            rows = slice(part * 4 // parts, (part + 1) * 4 // parts)
            if mixed:
                running.zero_grad()
            loss = running(ids[rows], targets[rows])
            loss.backward() if mixed else (loss / parts).backward()
            losses.append(loss.item())
            if mixed:
                _add(prepared, running, parts)
        return sum(losses) / parts

    def _add(to: nn.Module, source: nn.Module, parts: int) -> None:
        for own, other in zip(to.parameters(), source.parameters(), strict=True):
            grad = other.grad.to(own.dtype) / parts  # type: ignore[union-attr]
            own.grad = grad if own.grad is None else own.grad + grad

    gradients(0)
    first = {name: p.grad.clone() for name, p in prepared.named_parameters() if p.grad is not None}
    losses = []
    for step in range(STEPS):
        losses.append(gradients(step))
        optimizer.step()
    return {"gradients": first, "losses": losses, "parameters": parameters(prepared)}


def one_step(rank: int, folder: Path) -> float:
    """The shortest use of a group."""
    return train(DistributedDataParallel(model("W4")), rank, range(1), adam([torch.nn.Parameter(torch.zeros(1))]))[0]


def tensor_parallel(rank: int, folder: Path, configs: dict[str, Any]) -> dict[str, Any]:
    """A column-wise and a row-wise Linear over two processes, and the same in one: outputs, gradients, losses."""
    found = {}
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    mesh = init_device_mesh("cpu", (WORLD,))
    for name, config in configs.items():
        runs = []
        for parallel in (True, False):
            torch.manual_seed(0)
            layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 12)).double()
            if parallel:
                parallelize_module(layers, mesh, plan)
            prepared = qgraph.prepare(layers, config, x, inplace=True)
            optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
            losses = []
            for _ in range(5):
                optimizer.zero_grad()
                loss = prepared(x).square().mean()
                loss.backward()
                losses.append(loss.item())
                optimizer.step()
            runs.append({"losses": losses, "parameters": parameters(prepared)})
        found[name] = runs
    return found
