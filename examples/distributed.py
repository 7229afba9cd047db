"""Train a transformer at A8W4 over several processes: sharded, in bfloat16, with checkpoints that any number resumes.
Run, and after a crash again, for the same losses: torchrun --standalone --nproc-per-node 2 examples/distributed.py
"""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import qgraph

PARTS = 2  # of a batch; each process takes every world-th, so that their sum is the same on 1 process and on 2


def part_of_batch(step: int, part: int) -> torch.Tensor:  # sequences that count upwards, modulo 32
    starts = torch.randint(0, 32, (8, 1), generator=torch.Generator().manual_seed(step * PARTS + part))
    return (starts + torch.arange(17)) % 32


def main(folder: str = "checkpoints", steps: int = 60, every: int = 10) -> list[float]:
    torch.manual_seed(0)  # the same start everywhere
    layers = [nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True) for _ in range(2)]
    model = nn.Sequential(nn.Embedding(32, 64), *layers, nn.Linear(64, 32))
    model = qgraph.prepare(model, "A8W4@32", part_of_batch(0, 0)[:, :-1])  # first prepare, then shard
    for layer in [*model, model]:
        fully_shard(layer, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    if done := max((int(file.parent.name) for file in Path(folder).glob("*/.metadata")), default=0):  # written last
        state = dict(zip(("model_state_dict", "optim_state_dict"), get_state_dict(model, optimizer), strict=True))
        dcp.load(state, checkpoint_id=f"{folder}/{done}")
        set_state_dict(model, optimizer, **state)
    losses, world = [], dist.get_world_size()
    for step in range(done, steps):
        total = torch.zeros(())
        for part in range(dist.get_rank(), PARTS, world):
            ids = part_of_batch(step, part)
            loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten()) / PARTS
            (loss * world).backward()  # gradients are averaged over the processes
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        losses.append(total.item())
        if dist.get_rank() == 0:
            print(f"step {step} loss {total:.6f}", flush=True)
        if (step + 1) % every == 0:
            state = dict(zip(("model_state_dict", "optim_state_dict"), get_state_dict(model, optimizer), strict=True))
            dcp.save(state, checkpoint_id=f"{folder}/{step + 1}")
    return losses


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
