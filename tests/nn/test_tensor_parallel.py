"""Linear layers that torch's parallelize_module divides compute what whole ones do, or say why they cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import nn

import fourbit as fb
from fourbit.errors import UserError
from several_processes import together

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed training"),
]
RECIPES = ("nvfp4", "mxfp4-ceil-rht", "luq")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.mid = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mid(self.down(F.gelu(self.up(x))))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), Block(), Block(), nn.Linear(64, 16)).double()


def divided(model: nn.Sequential, mesh: Any) -> nn.Sequential:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {}
    for i in (1, 2):
        plan |= {f"{i}.up": ColwiseParallel(), f"{i}.down": RowwiseParallel()}
        plan[f"{i}.mid"] = ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(model, mesh, plan)


def losses(model: nn.Module, part: slice = slice(None), world: int = 1) -> list[float]:
    optimizer, found = torch.optim.AdamW(fb.param_groups(model, 0.01), lr=1e-2), []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(32, 64, generator=generator, dtype=torch.float64)
        y = torch.randint(16, (32,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[part]), y[part])
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    model.eval()
    with torch.no_grad():
        found.append(float(model(x[part]).square().mean()))
    return found


def said(do: Any) -> str:
    try:
        do()
    except (UserError, AttributeError) as error:
        return str(error)
    return "nothing"


def work(rank: int, world: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if world == 4:  # two by two: parts of the batch, parts of the layers
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("batch", "layers"))
        model = fb.convert(divided(network(), mesh["layers"]), "mxfp4-ceil-rht")
        for block in model:
            fully_shard(block, mesh=mesh["batch"])
        fully_shard(model, mesh=mesh["batch"])
        mine = slice(16 * mesh["batch"].get_local_rank(), 16 * mesh["batch"].get_local_rank() + 16)
        return {"losses": losses(model, mine)}
    mesh = init_device_mesh("cpu", (world,))
    found: dict[str, Any] = {r: losses(fb.convert(divided(network(), mesh), r)) for r in RECIPES}
    x = torch.randn(4, 64, dtype=torch.float64)
    found["remembers"] = said(lambda: fb.convert(divided(network(), mesh), "ibm2020")(x))
    narrow = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 16)).double()
    parallelize_module(narrow, mesh, {"0": ColwiseParallel()})
    found["blocks"] = said(lambda: fb.convert(narrow, "mxfp4")(x))
    for recipe, style in (("ibm2020", ColwiseParallel()), ("nvfp4", RowwiseParallel())):
        whole = fb.convert(network(), recipe)
        found[f"order, {recipe}"] = said(
            lambda whole=whole, style=style: parallelize_module(whole[1], mesh, {"up": style})
        )
    return found


def test_parts_of_layers_train_as_whole_ones(tmp_path):
    both = together(work, 2, tmp_path)
    for recipe in RECIPES:
        alone = losses(fb.convert(network(), recipe))
        for found in both:
            assert found[recipe] == pytest.approx(alone, rel=1e-9), recipe
    for found in both:
        assert "remembers numbers" in found["remembers"] and "nvfp4" in found["remembers"]
        assert "blocks of 32 do not divide" in found["blocks"]
        assert all("convert behind it" in found[f"order, {recipe}"] for recipe in ("ibm2020", "nvfp4"))


def test_parts_of_layers_and_of_the_batch_at_once(tmp_path):
    found = [each["losses"] for each in together(work, 4, tmp_path)]
    assert found[0] == found[1] and found[2] == found[3]  # the same part of the batch
    mean = [(a + b) / 2 for a, b in zip(found[0], found[2], strict=True)]
    alone = losses(fb.convert(network(), "mxfp4-ceil-rht"))
    assert mean[0] == pytest.approx(alone[0], rel=1e-12)
    assert mean[:3] == pytest.approx(alone[:3], rel=2e-3)  # blocks of wgrad are parts of each process's samples
