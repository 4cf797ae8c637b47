"""Gradients of several processes in few bits: the same in all processes, exact in the sum over steps, and they train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fourbit as fb
from fourbit.integrations.ddp import BLOCK, compress_gradients

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed training")
WAYS = {"plain": None, "int4": ("int4_sym", True), "int4 alone": ("int4_sym", False), "fp8": ("fp8_152", True)}


def work(rank: int, folder: str, world: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save({way: trained(rank, world, chosen) for way, chosen in WAYS.items()}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def trained(rank: int, world: int, chosen: tuple[str, bool] | None) -> dict[str, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 61), nn.ReLU(), nn.Linear(61, 4))
    model = DistributedDataParallel(fb.convert(net, "int4-fwd"), bucket_cap_mb=0.01)
    exchange = compress_gradients(model, chosen[0], error_feedback=chosen[1]) if chosen else None
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    generator, losses = torch.Generator().manual_seed(1), []
    sums = {"got": 0.0, "exact": 0.0}
    for step in range(40):
        x = torch.randn(64, 16, generator=generator)
        y = (x[:, :2] > 0).long() @ torch.tensor([1, 2])
        mine = slice(rank * 64 // world, (rank + 1) * 64 // world)
        loss = F.cross_entropy(model(x[mine]), y[mine])
        if step < 4:  # what this process has, before it is exchanged
            with model.no_sync():
                alone = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            exact = torch.cat([g.flatten() for g in alone]).double()
            distributed.all_reduce(exact)
        loss.backward()
        fb.synchronize(model)
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        if step < 4:
            sums["got"] = sums["got"] + grads.double()
            sums["exact"] = sums["exact"] + exact / world
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    found = {
        "losses": losses,
        "grads": grads,
        "off": float((sums["got"] - sums["exact"]).norm() / sums["exact"].norm()),
    }
    if exchange:
        found |= {"sent": exchange.sent_bytes, "plain": exchange.plain_bytes, "state": exchange.state_dict()}
    return found


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(work, (str(folder), request.param), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def test_all_processes_have_the_same_gradients(processes):
    for way in WAYS:
        for other in processes[1:]:
            assert torch.equal(processes[0][way]["grads"], other[way]["grads"]), way


def test_error_feedback_leaves_the_rounding_of_one_step_in_the_sum_of_four(processes):
    off = {way: processes[0][way]["off"] for way in WAYS}
    assert off["plain"] < 1e-5 < off["fp8"]
    assert off["int4"] < 0.6 * off["int4 alone"]  # four steps' errors, as a walk, would be twice that of one


def test_it_trains_and_sends_fewer_bytes(processes):
    last = {
        way: sum(p[way]["losses"][-5:][i] for p in processes for i in range(5)) / 5 / len(processes) for way in WAYS
    }
    assert last["plain"] < 1.2  # from log 4
    assert last["int4"] < 1.1 * last["plain"] and last["fp8"] < 1.1 * last["plain"]
    share = {way: processes[0][way]["sent"] / processes[0][way]["plain"] for way in ("int4", "fp8")}
    assert share["int4"] == pytest.approx((0.5 + 4 / BLOCK) / 4)
    assert share["fp8"] == pytest.approx((1 + 4 / BLOCK) / 4)


def test_what_it_is_not_for_is_said():
    with pytest.raises(fb.UserError, match="not by a Linear: wrap the model first"):
        compress_gradients(nn.Linear(2, 2))
