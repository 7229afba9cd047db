"""Two processes: DistributedDataParallel and fully_shard give the gradients of one process."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import qgraph
from tests.models import GPT


def _worst(ours, reference):
    pairs = zip(ours.parameters(), reference.parameters(), strict=True)
    gradients = ((a.grad.full_tensor() if hasattr(a.grad, "full_tensor") else a.grad, b.grad) for a, b in pairs)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in gradients)


def _work(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    prepared = qgraph.prepare(GPT().eval(), "A8W4@8", torch.randint(0, 33, (2, 7)))
    ids = torch.randint(0, 33, (4, 7), generator=torch.Generator().manual_seed(1))
    mine = ids[2 * rank : 2 * rank + 2]
    single, sharded = copy.deepcopy(prepared), copy.deepcopy(prepared)
    single(ids).square().mean().backward()
    replicated = DistributedDataParallel(prepared)
    replicated(mine).square().mean().backward()
    for block in sharded.blocks:
        fully_shard(block["attn"])
        fully_shard(block["mlp"])
    fully_shard(sharded)
    sharded(mine).square().mean().backward()
    worst = [None, None]
    dist.all_gather_object(worst, (_worst(prepared, single), _worst(sharded, single)))
    if rank == 0:
        torch.save(worst, results)
    dist.destroy_process_group()


def test_gradients_of_two_processes_are_those_of_one(tmp_path):
    results = tmp_path / "worst.pt"
    mp.spawn(_work, (str(tmp_path / "store"), str(results)), nprocs=2)
    for replicated, sharded in torch.load(results):
        # The halves of the batch are summed in another order: a few float32 ulp of the largest gradient.
        assert replicated < 1e-5 and sharded < 1e-5
