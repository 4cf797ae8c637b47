"""FSDP (fully_shard): parameters are whole only during a pass, and a clip value of one element lies in one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from torch import nn

import fourbit as fb
from fourbit.errors import UserError

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed training")


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    return fb.convert(nn.Sequential(*layers), "ibm2020")


def train(model: nn.Module, xs, between=lambda: None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for x in xs:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        between()
        optimizer.step()


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state_dict without shards; every process calls it."""
    found = model.state_dict()
    return {k: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for k, t in found.items()}


def shard(model: nn.Module, world_size: int, by_block: bool) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world_size,))
    if by_block:
        for block in model:
            if isinstance(block, nn.Linear):
                fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def work(rank: int, folder: str, world_size: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet{world_size}", rank=rank, world_size=world_size
    )
    xs = [torch.randn(16, 8, generator=torch.Generator().manual_seed(step)) for step in range(3)]
    found: dict[str, object] = {}
    for by_block in (False, True):
        model = shard(network(), world_size, by_block)
        train(model, xs, lambda model=model: fb.synchronize(model))
        found[f"trained, {by_block}"] = whole(model)
        quant = model[2].quant  # a clip value that an optimizer took below zero, in the process that has it
        shard_of_alpha = quant.x_alpha.detach().to_local()
        shard_of_alpha.sub_(10)
        model(xs[0]).square().mean().backward()
        found[f"below zero, {by_block}"] = float(quant.x_alpha.full_tensor())
    model = shard(network(), world_size, False)
    model(xs[0]).square().mean().backward()
    try:
        model[2](torch.rand(2, 16))
    except UserError as error:
        found["outside"] = str(error)
    model = shard(network(), world_size, True)
    with torch.no_grad():
        for name, t in model.named_parameters():
            if name == "0.bias":
                t.fill_(100.0 if rank == 0 else -100.0) if world_size > 1 else t.fill_(100.0)
    between = nn.ReLU() if rank == 0 else nn.Identity()  # the layers of the first process see no negative number
    hook = model[2].register_forward_pre_hook(lambda module, inputs: (between(inputs[0] - 3 * rank),))
    train(model, xs[:1], lambda: fb.synchronize(model))
    hook.remove()
    found["signed"] = int(model[2].quant.x_form[1]), float(model[2].quant.x_floor)
    found["alpha"] = float(model[2].quant.x_alpha.full_tensor())
    torch.save(found, f"{folder}/{world_size}-{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_sharded_model_trains_as_one_that_is_whole(tmp_path, world_size):
    if world_size == 1:
        threads = torch.get_num_threads()
        work(0, str(tmp_path), 1)
        torch.set_num_threads(threads)
    else:
        multiprocessing.spawn(work, (str(tmp_path), world_size), nprocs=world_size)
    alone = network()
    train(alone, [torch.randn(16, 8, generator=torch.Generator().manual_seed(step)) for step in range(3)])
    expected, alpha = alone.state_dict(), float(alone[2].quant.x_alpha.detach())
    found = [torch.load(tmp_path / f"{world_size}-{rank}.pt") for rank in range(world_size)]
    for each in found:
        for by_block in (False, True):
            mine = each[f"trained, {by_block}"]
            assert mine.keys() == expected.keys()
            for name, t in expected.items():
                torch.testing.assert_close(mine[name], t, rtol=1e-4, atol=1e-6, msg=name)
            assert each[f"below zero, {by_block}"] == pytest.approx(alpha / 2, rel=0.05)
        assert "fully_shard" in each["outside"]
        assert each["signed"] == found[0]["signed"] and each["alpha"] == found[0]["alpha"]
    assert found[0]["signed"][0] == (1 if world_size == 2 else 0)  # the other process saw negative numbers
    assert found[0]["alpha"] == pytest.approx(2 * found[0]["signed"][1], rel=0.2)


def test_a_model_that_was_trained_keeps_its_clip_values_when_it_is_sharded(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = network()
        train(model, [torch.randn(16, 8)])
        before = copy.deepcopy(model.state_dict())
        after = whole(shard(model, 1, False))
    finally:
        distributed.destroy_process_group()
    assert all(torch.equal(before[name], t) for name, t in after.items())
