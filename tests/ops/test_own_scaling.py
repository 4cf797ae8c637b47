"""A scaling that remembers something is two classes, and nothing else has to know of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fourbit as fb
from fourbit.errors import UserError
from fourbit.nn._lines import scales
from fourbit.quantizers import Amax, ClipValue, GradScale, Scaling, ScalingState, Stored, amax_of


class Largest(ScalingState):
    """The largest magnitudes of the last three steps, and of this one."""

    amaxes = Stored()

    def tensors(self, format):
        return {"amaxes": torch.zeros(4)}

    def begin(self, now):
        if now.training and self.amaxes[0] > 0:
            self.amaxes.copy_(self.amaxes.roll(1))
            self.amaxes[0] = 0

    def use(self, x, format, now):
        known = self.amaxes[1:].max()
        return format, known if known > 0 else amax_of(x)

    def saw(self, amax, now):
        if now.training:
            self.amaxes[0] = torch.maximum(self.amaxes[0], torch.as_tensor(amax))

    def votes(self):
        return [self.amaxes]

    def agree(self, votes, decisions):
        self.amaxes.copy_(votes[0].amax(0))
        return True

    def numbers(self):
        return {"amax": float(self.amaxes.max())}

    def __str__(self):
        return f"{self.operand} up to {float(self.amaxes.max()):.4g}"


@dataclass(frozen=True)
class Delayed(Scaling):
    """scale = largest of the last steps / format.max."""

    state_class: ClassVar[type[ScalingState] | None] = Largest
    operands: ClassVar[str] = "xw"

    def of(self, statistics, format, stored):
        return (stored / format.max).clamp_min(2.0**-126)


SPEC = fb.LayerSpec(x_fprop=fb.QuantSpec("int4_sym", Delayed()), w_fprop=fb.QuantSpec("int4_sym", Delayed()))
RECIPE = fb.Recipe("own", (fb.Rule(SPEC, types=(nn.Linear,)),))


def network(spec: fb.LayerSpec = SPEC) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return fb.convert(model, fb.Recipe("own", (fb.Rule(spec, types=(nn.Linear,)),)))


class Checkpointed(nn.Module):
    """The forward pass is computed again in the backward pass."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def batches(n: int) -> list[Tensor]:
    return [(2.0**-i) * torch.rand(16, 8, generator=torch.Generator().manual_seed(i)) for i in range(n)]


def train(model: nn.Module, xs: list[Tensor]) -> list[float]:
    optimizer = torch.optim.SGD(fb.param_groups(model), lr=0.1)
    losses = []
    for x in xs:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_it_follows_the_steps():
    model, xs = network(), batches(6)
    train(model, xs)
    kept = model[0].quant.x_amaxes.tolist()
    assert kept == [float(x.max()) for x in reversed(xs[2:])]
    model.eval()(100 * xs[0])
    assert model[0].quant.x_amaxes.tolist() == kept


def test_a_recomputed_pass_counts_once():
    plain, again, xs = network(), network(), batches(5)
    train(plain, xs)
    train(Checkpointed(again), xs)
    for name, t in plain.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], t, rtol=0, atol=0, msg=name)


def test_a_run_goes_on_from_a_checkpoint_or_a_copy():
    model, xs = network(), batches(8)
    train(model, xs[:4])
    loaded, copied = network(), copy.deepcopy(model)
    loaded.load_state_dict(model.state_dict())
    expected = train(model, xs[4:])
    assert train(loaded, xs[4:]) == expected == train(copied, xs[4:])
    assert "0.quant.w_amaxes" in model.state_dict()


def test_processes_reports_and_explanations_find_it():
    model = network()
    train(model, batches(3))
    quant = model[0].quant
    told = quant.shared()
    assert told.numel() == 8
    quant.agree(torch.stack((told, 3 * told)))
    assert float(quant.x_amaxes.max()) == pytest.approx(3 * float(told[:4].max()))
    assert scales(model)["0"]["x_amax"] == float(quant.x_amaxes.max())
    assert "x up to" in str(fb.explain(model, RECIPE, torch.rand(2, 8)))
    with quant.preserved():
        model(100 * torch.rand(16, 8))
        assert float(quant.x_amaxes.max()) > 10
    assert float(quant.x_amaxes.max()) < 10


def test_another_spec_brings_what_it_remembers_and_what_was_remembered_stays():
    plain = fb.LayerSpec(x_fprop=fb.QuantSpec("int4_sym", Amax()), w_fprop=fb.QuantSpec("int4_sym", Amax()))
    model, xs = network(plain), batches(6)
    train(model, xs[:2])
    for layer in (model[0], model[2]):
        layer.quant.respec(SPEC)
    train(model, xs[2:4])
    kept = model[0].quant.x_amaxes.clone()
    assert kept[0] > 0
    model[0].quant.respec(plain)
    train(model, xs[4:])
    assert torch.equal(model[0].quant.x_amaxes, kept)
    scaled = fb.LayerSpec(g_dgrad=fb.QuantSpec("fp8_152", GradScale()), g_wgrad=fb.REUSE)
    model[0].quant.respec(scaled)
    train(model, xs[:2])
    assert model[0].quant.g_exponent > 0


def test_what_an_optimizer_is_to_train_must_be_there_before_it():
    plain, learned = fb.LayerSpec(), fb.LayerSpec(x_fprop=fb.QuantSpec("uint4", ClipValue()))
    model, xs = network(plain), batches(4)
    quant = model[0].quant
    before = dict(quant.named_parameters())
    with pytest.raises(UserError, match=r"no optimizer knows of it: call layer\.quant\.prepare"):
        quant.respec(learned)
    assert dict(quant.named_parameters()) == before and quant.spec == plain
    quant.prepare(learned)
    optimizer = torch.optim.SGD(fb.param_groups(model), lr=0.1)
    assert [group["name"] for group in optimizer.param_groups] == ["weights", "alpha"]
    quant.respec(learned)
    model(xs[0]).square().mean().backward()
    first = float(quant.x_alpha.detach())
    model(4 * xs[0]).square().mean().backward()
    optimizer.step()
    assert first > 0 and float(quant.x_alpha.detach()) != first


def test_scales_per_channel_do_not_become_one():
    def spec(granularity):
        return fb.LayerSpec(g_dgrad=fb.QuantSpec("fp8_152", GradScale(), granularity), w_dgrad=None, g_wgrad=None)

    layer = fb.nn.Linear(8, 4, spec=fb.LayerSpec(g_wgrad=fb.QuantSpec("fp8_152", GradScale(), "channel")))
    with pytest.raises(UserError, match="where the layer remembers others: convert again"):
        layer.quant.respec(spec("tensor"))
