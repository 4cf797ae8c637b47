"""Four bits under FSDP2: sharded digits, checkpoints that any number of processes goes on from, restarts by torchrun.

torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/fsdp2.py CHECKPOINTS
torchrun --standalone --nproc-per-node 4 examples/fsdp2.py CHECKPOINTS --epochs 12      # goes on, in four processes

If a process dies, torchrun ends the others and starts all again, and they go on from the newest whole checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as distributed
import torch.distributed.checkpoint as checkpoint
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fourbit as fb
from fourbit import data, recipes

BATCH = 64

parser = argparse.ArgumentParser(description="Four bits under FSDP2.")
parser.add_argument("folder", type=Path)
parser.add_argument("--recipe", default="ibm2020", choices=recipes.names(), metavar="RECIPE")
parser.add_argument("--epochs", type=int, default=6)
options = parser.parse_args()

on_gpu = torch.cuda.is_available()
store, rank, world = next(distributed.rendezvous("env://"))
# A part of torchrun's store for each start: in the rest lie addresses of processes that are gone.
store = distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
distributed.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world)
if BATCH % world:
    sys.exit(f"{world} processes cannot share a batch of {BATCH} equally: start a number that divides it.")
device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)

torch.manual_seed(0)
digits = data.load("digits")
pixels = digits.channels * digits.image_size**2
blocks = [nn.Sequential(nn.Linear(128, 128), nn.LayerNorm(128), nn.ReLU()) for _ in range(3)]
model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 128), nn.ReLU(), *blocks, nn.Linear(128, digits.num_classes))
fb.convert(model, options.recipe).to(device)
mesh = init_device_mesh(device.type, (world,))
for block in blocks:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
fb.share_batch(model)  # scales of the whole batch: the number of processes changes no loss
optimizer = torch.optim.AdamW(fb.param_groups(model, weight_decay=0.01), lr=2e-3)


def accuracy() -> float:
    """On the test digits. Every process calls it: the layers are gathered for all."""
    model.eval()
    with torch.no_grad():
        batches = data.batches(digits, "test", 360, seed=0, epoch=0)
        hits = [(model(x.to(device)).argmax(1).cpu() == y).sum() for x, y in batches]
    return int(sum(hits)) / len(digits.test_y)


names = [path.parent.name for path in options.folder.glob("*/.metadata")]
whole = [int(name) for name in names if name.isdigit()]  # written last
newest = torch.tensor(max(whole, default=0), device=device)
distributed.broadcast(newest, 0)  # what the first process sees counts for all
first = int(newest)
if first:
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.load(parts, checkpoint_id=options.folder / str(first))
    set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    share = accuracy()
    if rank == 0:
        print(f"goes on from epoch {first} with {world} processes, test accuracy {share:.2%}", flush=True)

mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
for epoch in range(first, options.epochs):
    model.train()
    for x, y in data.batches(digits, "train", BATCH, seed=0, epoch=epoch):
        loss = F.cross_entropy(model(x[mine].to(device)), y[mine].to(device))
        loss.backward()
        fb.synchronize(model)
        optimizer.step()
        optimizer.zero_grad()
    mean, share = loss.detach() / world, accuracy()
    distributed.all_reduce(mean)
    if rank == 0:
        print(f"epoch {epoch + 1}: last loss {float(mean):.6f}, test accuracy {share:.2%}", flush=True)
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.save(parts, checkpoint_id=options.folder / str(epoch + 1))
distributed.destroy_process_group()
