"""FSDP2 under its policies, and checkpoints of `torch.distributed.checkpoint` that another number of processes goes on from."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import nn

import fourbit as fb
from several_processes import together

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed training"),
]
RECIPES = ("ibm2020", "nvfp4")
POLICIES = ("plain", "not resharded", "bfloat16")
BATCH = 64


def network(recipe: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = (32, 64, 64, 64, 64, 64, 16)
    layers = [f for a, b in pairwise(sizes) for f in (nn.Linear(a, b), nn.ReLU())]
    return fb.convert(nn.Sequential(*layers[:-1]), recipe)


def sharded(model: nn.Module, world: int, policy: str = "plain") -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh, options = init_device_mesh("cpu", (world,)), {}
    if policy == "not resharded":
        options = {"reshard_after_forward": False}
    if policy == "bfloat16":
        options = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **options)
    model = fully_shard(model, mesh=mesh, **options)
    fb.share_batch(model)
    return model


def optimizer_of(model: nn.Module, kind: str = "AdamW") -> torch.optim.Optimizer:
    groups = fb.param_groups(model, 0.01, alpha_weight_decay=0.1)
    if kind == "AdamW":
        return torch.optim.AdamW(groups, lr=1e-2)
    import torchao.optim

    return getattr(torchao.optim, kind)(groups, lr=1e-2, block_size=128)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, world: int, steps: range) -> list[float]:
    mine, losses = slice(rank * BATCH // world, (rank + 1) * BATCH // world), []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(BATCH, 32, generator=generator), torch.randint(16, (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[mine]).float(), y[mine])
        loss.backward()
        fb.synchronize(model)
        optimizer.step()
        total = loss.detach() / world
        distributed.all_reduce(total)
        losses.append(float(total))
    return losses


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for n, t in model.state_dict().items()}


def work(rank: int, world: int, folder: str, kinds: tuple[str, ...]) -> dict[str, Any]:
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    torch.compiler.set_stance("force_eager")
    found: dict[str, Any] = {}
    for recipe in RECIPES:
        for policy in POLICIES:
            model = sharded(network(recipe), world, policy)
            found[f"{recipe}, {policy}"] = train(model, optimizer_of(model), rank, world, range(4))
    for kind in kinds:
        model = sharded(network("ibm2020"), world)
        optimizer = optimizer_of(model, kind)
        if world == 4:
            train(model, optimizer, rank, world, range(3))
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        if world == 4:
            checkpoint.save(parts, checkpoint_id=f"{folder}/{kind}")
        else:
            checkpoint.load(parts, checkpoint_id=f"{folder}/{kind}")
            set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
        found[f"{kind}, here"] = whole(model)
        found[f"{kind}, later"] = train(model, optimizer, rank, world, range(3, 6))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What the first of 4, 2 and 1 processes found: the first four leave checkpoints, from which the others go on."""
    folder = tmp_path_factory.mktemp("checkpoints")
    try:
        import torchao.optim  # noqa: F401

        kinds = ("AdamW", "AdamW8bit", "AdamW4bit")
    except ImportError:
        kinds = ("AdamW",)
    return {n: together(work, n, tmp_path_factory.mktemp(f"of{n}"), str(folder), kinds)[0] for n in (4, 2, 1)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_sharded_model_trains_alike_in_any_number_of_processes(found, recipe):
    for n in (4, 2):
        for policy in POLICIES:
            name = f"{recipe}, {policy}"
            assert found[n][name] == pytest.approx(found[1][name], rel=2e-3), name
            assert found[n][name][0] == pytest.approx(found[1][name][0], rel=1e-6), name
        assert found[n][f"{recipe}, plain"] == found[n][f"{recipe}, not resharded"]
    assert found[1][f"{recipe}, bfloat16"] != found[1][f"{recipe}, plain"]


@pytest.mark.parametrize("kind", ["AdamW", "AdamW8bit", "AdamW4bit"])
def test_another_number_of_processes_goes_on_from_a_checkpoint(found, kind):
    if f"{kind}, here" not in found[4]:
        pytest.skip("torchao is not installed")
    saved = found[4][f"{kind}, here"]
    assert any(name.endswith("alpha") and bool((t > 0).all()) for name, t in saved.items())
    for n in (2, 1):
        here = found[n][f"{kind}, here"]
        assert here.keys() == saved.keys()
        assert all(torch.equal(t, here[name]) for name, t in saved.items())
        assert found[n][f"{kind}, later"] == pytest.approx(found[4][f"{kind}, later"], rel=5e-3)
