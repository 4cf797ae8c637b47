"""Two processes with different halves of a batch end every step with the same clip values and scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fourbit as fb
from fourbit.ops import LayerState
from fourbit.quantizers import UNSET

RECIPES = ("ibm2020", "ibm2020-global-scale", "ibm2020-channel-gradscale")


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    """Clip values, their signs, exponents and votes."""
    kept = ("x_alpha", "w_alpha", "x_form", "w_form", "x_floor", "g_exponent", "g_amax")
    return {name: t.detach().clone() for name, t in model.state_dict().items() if name.rsplit(".", 1)[-1] in kept}


def three_layers() -> nn.Module:
    return fb.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), "ibm2020")


def middle(model: nn.Module) -> LayerState:
    return next(each.quant for each in fb.quantized_layers(model).values() if "x" in each.quant.scalings)


def work(rank: int, folder: str, steps: int) -> None:
    """One process: trains a model by each recipe, and leaves its states before and after each agreement."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save({recipe: trained(rank, recipe, steps) for recipe in RECIPES}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def trained(rank: int, recipe: str, steps: int) -> list[Any]:
    torch.manual_seed(0)
    between = nn.Identity() if rank else nn.ReLU()  # one process sees negative numbers, the other none
    model = fb.convert(
        nn.Sequential(nn.Linear(16, 24), between, nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)), recipe
    )
    shared = DistributedDataParallel(model)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), fb.loss_scaler(model)
    generator, found = torch.Generator().manual_seed(rank), []
    for _ in range(steps):
        x = (1 + 3 * rank) * torch.randn(32, 16, generator=generator)  # one half is much larger than the other
        loss = shared(x).square().mean()
        (scaler.scale(loss) if scaler else loss).backward()
        before = states(model)
        fb.synchronize(model)
        found.append((before, states(model), scaler.value if scaler else None))
        if scaler is None or scaler.unscale_(optimizer):
            optimizer.step()
        if scaler:
            scaler.update()
        optimizer.zero_grad()
    return found


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both leave: starting them takes longer than all that they do."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(work, (str(folder), 6), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed training")
@pytest.mark.parametrize("recipe", RECIPES)
def test_all_processes_have_one_state(two_processes, recipe):
    first, second = (found[recipe] for found in two_processes)
    disagreed = set()
    for (before_0, after_0, scale_0), (before_1, after_1, scale_1) in zip(first, second, strict=True):
        assert after_0.keys() == after_1.keys() and scale_0 == scale_1
        for name in after_0:
            assert torch.equal(after_0[name], after_1[name]), name
            if not torch.equal(before_0[name], before_1[name]):
                disagreed.add(name.rsplit(".", 1)[-1])
    assert {"x_alpha", "x_form", "x_floor", "g_amax"} <= disagreed  # without it they go apart


def test_the_vote_is_the_sign_of_the_sum():
    """Beyond the range a gradient votes down, in its lower half up."""
    model = three_layers()
    state = middle(model)
    scaling = state.spec.g_scaling.scaling
    up, down = torch.tensor(scaling.max / 64), torch.tensor(scaling.max * 4)
    assert int(scaling.vote(up)) == -int(scaling.vote(down)) != 0
    assert float(agreed_vote(state, up, up, down)) == float(up)
    assert float(agreed_vote(state, up, down, down)) == float(down)
    assert float(agreed_vote(state, up, down)) == -1 and int(scaling.vote(state.g_amax)) == 0


def test_first_votes_are_cast_under_the_exponent_that_all_will_have():
    """Largest gradients 1, 2 and 8 set 2^6, 2^5 and 2^3; under 2^3 they vote up, up, and not at all."""
    model = three_layers()
    state = middle(model)
    scaling, told = state.spec.g_scaling.scaling, []
    with torch.no_grad():
        for largest in (1.0, 2.0, 8.0):
            exponent = scaling.first_exponent(torch.tensor(largest))
            state.g_exponent.fill_(int(exponent))
            state.g_amax.fill_(largest * 2.0 ** int(exponent))
            told.append(state.shared())
        state.agree(torch.stack(told))
    assert int(state.g_exponent) == 3
    assert float(state.g_amax) == 2 * 2.0**3  # the largest of those that vote up
    assert int(scaling.vote(state.g_amax)) == 1


def agreed_vote(state: LayerState, *amax: torch.Tensor) -> torch.Tensor:
    """What the layer keeps if several processes, equal otherwise, recorded these largest gradients."""
    told = []
    with torch.no_grad():
        for each in amax:
            state.g_amax.copy_(each)
            told.append(state.shared())
        state.agree(torch.stack(told))
    return state.g_amax


def test_the_smallest_first_exponent_wins_and_an_unset_one_does_not():
    """The first process has seen no negative number, the second no batch, the third a negative one."""
    model = three_layers()
    state = middle(model)
    told = []
    with torch.no_grad():
        for exponent, form, alpha in ((9, [1, 0], 1.5), (UNSET, [0, 0], 0.0), (7, [0, 1], 0.25)):
            state.g_exponent.fill_(exponent)
            state.x_form.copy_(torch.tensor(form))
            state.x_alpha.fill_(alpha)
            told.append(state.shared())
        state.agree(torch.stack(told))
    assert int(state.g_exponent) == 7
    assert float(state.x_alpha.detach()) == 0.25 and state.x_form.tolist() == [0, 1] and float(state.x_floor) == 0.125


def test_what_the_first_batch_decided_is_told_until_all_have_it():
    model = three_layers()
    state = middle(model)
    undecided = state.shared().numel()
    with torch.no_grad():
        state.agree(state.shared().expand(2, -1))
        assert state.shared().numel() == undecided > state.g_amax.numel()
        state.g_exponent.fill_(3)
        state.x_form[0] = 1
        state.agree(state.shared().expand(2, -1))
    assert state.shared().numel() == state.g_amax.numel()


def test_alone_it_does_nothing():
    model = three_layers()
    before = states(model)
    fb.synchronize(model)
    assert states(model).keys() == before.keys() and all(torch.equal(before[n], t) for n, t in states(model).items())
