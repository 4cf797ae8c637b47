"""Processes that share a batch compute what one does with the whole of it."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fourbit as fb
from fourbit import recipes
from fourbit.errors import UserError
from fourbit.quantizers import Share, Slice, Tile
from several_processes import together

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed training")
QUICK = ("ibm2020-attention", "fourbit", "nvfp4")
RECIPES = (*QUICK, "ibm2020-channel-gradscale", "luq", "nvfp4-4over6")
STEPS, BATCH = 4, 64


class Network(nn.Module):
    """Both geometries, inputs without and with negative numbers, and products of two activations."""

    def __init__(self, with_attention: bool = False) -> None:
        super().__init__()
        self.conv, self.inner = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True) if with_attention else None
        self.first, self.second, self.last = (nn.Linear(16 * n, 16) for n in (4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.inner(F.relu(self.conv(x)))).flatten(2).transpose(1, 2)
        x = x if self.attention is None else self.attention(x, x, x, need_weights=False)[0]
        return self.last(self.second(F.relu(self.first(x.flatten(1)))))


class Encoder(nn.Sequential):
    """Its attention stays in full precision, its linear layers have the layout of its input."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__(
            nn.Linear(32, 32), nn.TransformerEncoderLayer(32, 2, 64, batch_first=batch_first), nn.Linear(32, 32)
        )


def without_output(recipe: str) -> recipes.Recipe:
    """The recipe, its products not rounded: each process's would be, before their mean is taken."""
    found = recipes.get(recipe)
    rules = (r if r.spec is None else replace(r, spec=replace(r.spec, output=None)) for r in found.rules)
    return replace(found, name=f"{recipe}-wide", rules=tuple(rules))


def trained(recipe: str, rank: int, world: int, shared: bool = True) -> dict[str, Any]:
    torch.manual_seed(0)
    model = fb.convert(Network(recipe.endswith("attention")), without_output(recipe)).double()
    wrapped = DistributedDataParallel(model) if world > 1 else model
    if world > 1 and shared:
        fb.share_batch(model)
    optimizer = torch.optim.SGD(fb.param_groups(model), 0.1, momentum=0.9)
    scaler = fb.loss_scaler(model)
    generator, losses, scales = torch.Generator().manual_seed(1), [], []
    for _ in range(STEPS):
        x = torch.randn(BATCH, 3, 6, 6, generator=generator, dtype=torch.float64) * torch.linspace(
            0.5, 2, BATCH, dtype=torch.float64
        ).view(-1, 1, 1, 1)
        y = torch.randint(16, (BATCH,), generator=generator)
        mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        optimizer.zero_grad()
        loss = F.cross_entropy(wrapped(x[mine]), y[mine])
        (scaler.scale(loss) if scaler else loss).backward()
        fb.synchronize(model)
        if scaler is None or scaler.unscale_(optimizer):
            optimizer.step()
        if scaler:
            scaler.update()
        total = loss.detach() / world
        if world > 1:
            distributed.all_reduce(total)
        losses.append(float(total))
        scales.append(
            {n: t.clone() for n, t in model.state_dict().items() if n.endswith(("alpha", "form", "exponent"))}
        )
    return {"losses": losses, "scales": scales, "model": {n: t.clone() for n, t in model.state_dict().items()}}


def recipes_for(world: int) -> tuple[str, ...]:
    return QUICK if world == 2 else RECIPES


def work(rank: int, world: int) -> dict[str, Any]:
    found = {recipe: trained(recipe, rank, world) for recipe in recipes_for(world)}
    model = fb.convert(Network(), "nvfp4")
    fb.share_batch(model)
    try:
        model(torch.ones(16 if rank else 32, 3, 6, 6))
    except UserError as error:
        found["unequal"] = str(error)
    return found | {"alone": trained("fourbit", rank, world, shared=False)}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(work, request.param, tmp_path_factory.mktemp("processes"))


def test_any_number_of_processes_trains_as_one_does(processes):
    world = len(processes)
    shift = world.bit_length() - 1
    for recipe in recipes_for(world):
        alone = trained(recipe, 0, 1)
        for found in (each[recipe] for each in processes):
            assert found["losses"] == pytest.approx(alone["losses"], rel=1e-9), recipe
            for mine, whole in zip(found["scales"], alone["scales"], strict=True):
                for name, t in whole.items():
                    expected = t - shift if name.endswith("exponent") else t
                    torch.testing.assert_close(mine[name], expected, rtol=1e-6, atol=0, msg=f"{recipe}: {name}")
            for name, t in alone["model"].items():
                if not name.endswith(("g_exponent", "g_amax")):
                    torch.testing.assert_close(found["model"][name], t, rtol=1e-6, atol=1e-9, msg=f"{recipe}: {name}")


def test_without_it_each_process_scales_its_part(processes):
    alone = trained("fourbit", 0, 1)
    assert processes[0]["alone"]["losses"][1:] != pytest.approx(alone["losses"][1:], rel=1e-6)


def test_parts_of_different_sizes_end_all_processes_in_one_sentence(processes):
    for found in processes:
        assert "parts of" in found["unequal"] and "equal part of the batch" in found["unequal"]


@pytest.mark.parametrize(("axis", "order"), [(0, (0, 1, 2)), (1, (0, 1, 2)), (2, (2, 0, 1)), (-1, (1, 2, 0))])
def test_an_element_has_the_position_that_it_has_in_the_whole(axis, order):
    """`order`: of axes in memory, the slowest first."""
    back = [order.index(d) for d in range(3)]
    whole = torch.arange(6 * 4 * 2).view([(6, 4, 2)[d] for d in order]).permute(back)
    for number, part in enumerate(whole.chunk(2, axis)):
        share = Share.__new__(Share)
        share.number, share.count = number, 2
        dense = part.permute(order).contiguous().permute(back)
        assert torch.equal(Slice(share, axis).positions(dense), part)


def test_what_depends_on_the_batch_in_another_way_is_refused(tmp_path):
    with pytest.raises(UserError, match="init_process_group first"):
        fb.share_batch(fb.convert(Network(), "nvfp4"))
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        for model, recipe, why in (
            (Network(), "int4-qat", "learns the step size of x"),
            (
                nn.Sequential(nn.Linear(16, 16), nn.LSTM(16, 16), nn.Linear(16, 16)),
                "int4-fwd",
                "runs its products in pieces",
            ),
            (Network(with_attention=True), "luq", "has tokens before samples"),
            (Network(), "ibm2020-corrected", "restores what rounding has lost"),
            (
                Encoder(batch_first=False),
                "luq",
                "tokens before samples, as 1.self_attn has .*batch_first=True. Or train",
            ),
            (
                Encoder(batch_first=False),
                "nvfp4",
                "before samples",
            ),
        ):
            with pytest.raises(UserError, match=why):
                fb.share_batch(fb.convert(model, recipe, skip="self_attn" if isinstance(model, Encoder) else None))
        for batch_first, recipe in ((True, "luq"), (False, "int4-fwd")):  # scales of the tensor do not go by places
            fb.share_batch(fb.convert(Encoder(batch_first), recipe, skip="self_attn"))
        model = fb.convert(Network(), "luq")
        fb.share_batch(model)
        assert copy.deepcopy(model).inner.quant.sharing is not None
        assert pickle.loads(pickle.dumps(model)).inner.quant.sharing is None
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("axis", "shape", "tile", "block", "refused"),
    [
        (3, (1, 4, 1, 16), Tile(1, 32), 1, True),
        (3, (1, 4, 1, 64), Tile(1, 32), 1, False),
        (3, (1, 4, 1, 16), Tile(1, 16), 32, True),
        (1, (1, 8, 1, 64), Tile(16, 16), 1, True),
        (1, (1, 8, 1, 20), Tile(1, 16), 64, False),
        (3, (1, 4, 1, 7), Tile(1, None), 1, False),
    ],
)
def test_parts_that_cut_blocks_of_the_whole_batch_are_refused(axis, shape, tile, block, refused):
    share = Share.__new__(Share)
    share.number, share.count = 0, 2
    with pytest.raises(UserError, match="give each a multiple of") if refused else nullcontext():
        Slice(share, axis).require_whole(shape, tile, block)
    share.count = 1
    Slice(share, axis).require_whole(shape, tile, block)
