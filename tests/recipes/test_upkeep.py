"""What recipes look after from step to step: averages, oscillating weights, channels that stand out. Each against its
arithmetic written out, and across a resume."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fourbit as fb
from fourbit import UserError
from fourbit.formats import FP4_E2M1, INT4_SYM, MXFP4_CEIL, NVFP4
from fourbit.nn import OsciReset, OutControl, QEma, QRamping, nearest_weight
from fourbit.quantizers import Hadamard, round_toward

TETRAJET = fb.recipes.get("tetrajet").rules[-1].spec
OUTER = fb.recipes.get("tetrajet2-outer").rules[-1].spec


def looked_after(*upkeep, spec=TETRAJET):
    return fb.Recipe("mine", (fb.Rule(spec),), upkeep=upkeep)


def linear(recipe, features=64, out=32):
    torch.manual_seed(0)
    layer = nn.Linear(features, out, bias=False)
    model = fb.convert(nn.Sequential(layer), recipe)
    return model, fb.scheduler(model, recipe, 1000)


@pytest.mark.parametrize("format", [FP4_E2M1, INT4_SYM], ids=str)
def test_numbers_are_rounded_to_the_side_of_their_average_as_the_definition_says(format):
    torch.manual_seed(0)
    x = torch.cat([torch.randn(400) * 4, torch.tensor(format.grid), torch.tensor([0.0, 99.0, -99.0])])
    for average in (x, x + torch.randn_like(x), -x, torch.zeros_like(x)):
        expected = [format.round_toward(v, a) for v, a in zip(x.tolist(), average.tolist(), strict=True)]
        assert round_toward(x, average, format).tolist() == expected
    assert round_toward(torch.tensor([math.nan]), torch.zeros(1), format).isnan().all()


def test_an_outer_block_has_the_scales_of_a_tensor_of_its_own():
    torch.manual_seed(0)
    x = torch.randn(5, 300) * torch.exp2(torch.randint(-9, 9, (5, 300)).float())
    expected = [
        [v for start in range(0, 300, 128) for v in NVFP4.dequantize(NVFP4.quantize(row[start : start + 128]))]
        for row in x.tolist()
    ]
    assert torch.equal(fb.quantize(x, OUTER.x_fprop).dequantize(), torch.tensor(expected))


def ceil_rows(t, average=None):
    """Rows in MXFP4 with scales rounded up, and, with an average, elements to its side; float64."""
    rows = []
    for row, mean in zip(t.tolist(), (t if average is None else average).tolist(), strict=True):
        scales = [MXFP4_CEIL.scale.values[code] for code in MXFP4_CEIL.quantize(row).scales]
        rounded = []
        for i, (v, m) in enumerate(zip(row, mean, strict=True)):
            s = scales[i // 32]
            rounded.append(s * (FP4_E2M1.round(v / s) if average is None else FP4_E2M1.round_toward(v / s, m / s)))
        rows.append(rounded)
    return torch.tensor(rows, dtype=torch.float64)


def test_q_ema_rounds_weights_to_the_side_of_their_average_after_some_steps():
    model, scheduler = linear(looked_after(QEma(decay=0.9, after=3)))
    mean, differing = None, 0
    for step in range(6):
        scheduler.at(step)
        scheduler.at(step)  # once for each step
        w = model[0].weight.detach().clone()
        mean = w.clone() if mean is None else 0.9 * mean + 0.1 * w
        torch.manual_seed(step)
        x = torch.randn(8, 64)
        expected = ceil_rows(w) if step < 3 else ceil_rows(w, mean)
        differing += int((ceil_rows(w) != expected).sum())
        torch.testing.assert_close(model(x).double(), ceil_rows(x) @ expected.T, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            model[0].weight += 0.05 * torch.randn_like(w)
    assert differing > 50


def test_oscireset_sets_weights_whose_rounding_moves_much_further_than_they_do():
    model, scheduler = linear(looked_after(OsciReset(start=4, every=10, window=3, ratio=8.0)))
    weight = model[0].weight
    before = moved = jumped = None
    torch.manual_seed(1)
    for step in range(20):
        w = weight.detach().clone()
        if step in (4, 14):
            before, moved, jumped = w, torch.zeros_like(w), torch.zeros_like(w)
        elif step in (5, 6, 7, 15, 16, 17):
            moved += (w - before).abs()
            jumped += (ceil_rows(w) - ceil_rows(before)).abs().float()
            before = w
        scheduler.at(step)
        if step in (8, 18):
            oscillates = (moved > 0) & (jumped / moved >= 8)
            assert 0 < int(oscillates.sum()) < w.numel() / 4
            assert torch.equal(weight, torch.where(oscillates, ceil_rows(w).float(), w))
        else:
            assert torch.equal(weight, w)
        with torch.no_grad():
            weight += 0.002 * torch.randn_like(w)


def test_q_ramping_updates_oscillating_weights_every_few_steps_by_as_many_steps():
    spec = QRamping(every=50, window=4, ratio=2.0, gain=2.0)
    model, scheduler = linear(looked_after(spec))
    weight = model[0].weight
    optimizer = torch.optim.AdamW([weight], lr=1e-2, betas=(0.8, 0.9), weight_decay=0.0)
    scheduler.attach(optimizer)
    w = weight.detach().clone().double()
    m, v, period = torch.zeros_like(w), torch.zeros_like(w), torch.ones_like(w)
    waited, gradient, before, moved, jumped = (torch.zeros_like(w) for _ in range(5))
    torch.manual_seed(1)
    for step in range(16):
        scheduler.at(step)
        now = weight.detach().clone()
        if step == 0:
            before = now
        elif step <= 4:
            moved += (now - before).abs()
            jumped += (ceil_rows(now) - ceil_rows(before)).abs()
            before = now
            if step == 4:
                period = ((jumped / 2 / (moved + 1e-8)).floor() * 2 + 1).floor().clamp(max=50)
                assert set(period.flatten().tolist()) > {1.0, 3.0}
        g = torch.randn_like(weight)
        weight.grad = g.clone()
        optimizer.step()
        waited, gradient = waited + 1, gradient + g
        due = waited % period == 0
        mean = gradient / waited
        m = torch.where(due, 0.8 * m + 0.2 * mean, m)
        v = torch.where(due, 0.9 * v + 0.1 * mean**2, v)
        t = step + 1
        change = 1e-2 * waited * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8)
        w = torch.where(due, w - change, w)
        waited, gradient = waited.masked_fill(due, 0.0), gradient.masked_fill(due, 0.0)
        torch.testing.assert_close(weight.double(), w, rtol=1e-4, atol=1e-5)


def e4m3_rows(t):
    """MXFP8 with scales rounded up."""
    import dataclasses

    return torch.tensor(dataclasses.replace(fb.formats.MXFP8_E4M3, rule="ceil").round(t.tolist()), dtype=torch.float64)


def nvfp4_rows(t):
    """NVFP4 whose tensors are outer blocks of 128."""
    parts = [
        [NVFP4.dequantize(NVFP4.quantize(row[i : i + 128])) for i in range(0, len(row), 128)] for row in t.tolist()
    ]
    return torch.tensor([[v for part in row for v in part] for row in parts], dtype=torch.float64)


def test_outcontrol_gives_channels_that_stand_out_products_of_their_own():
    recipe = fb.recipes.get("tetrajet2-full")
    high = recipe.upkeep[1].high
    model, scheduler = linear(looked_after(OutControl(high, 0.1, start=1, steps=2), spec=OUTER), 160, 32)
    loud = torch.ones(160)
    loud[[3, 77, 150]] = 20.0
    norms = torch.zeros(160)
    for step in range(5):
        scheduler.at(step)
        torch.manual_seed(step)
        x = (torch.randn(24, 160) * loud).requires_grad_()
        y = model(x)
        if step in (1, 2):
            norms += x.detach().norm(dim=0)
        w, channels = model[0].weight.detach(), model[0].quant.channels
        if step < 3:
            assert not channels.chosen.any()
            torch.testing.assert_close(y.double(), nvfp4_rows(x) @ nvfp4_rows(w).T, rtol=1e-4, atol=1e-3)
            continue
        top = norms.topk(16).indices.sort().values
        assert torch.equal(channels.chosen.nonzero()[:, 0], top) and {3, 77, 150} <= set(top.tolist())
        rest = torch.tensor([i for i in range(160) if i not in top.tolist()])
        expected = nvfp4_rows(x[:, rest]) @ nvfp4_rows(w[:, rest]).T + e4m3_rows(x[:, top]) @ e4m3_rows(w[:, top]).T
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-3)
        model.zero_grad()
        g = torch.randn_like(y)
        y.backward(g)
        dw = e4m3_rows(g.T.contiguous()) @ e4m3_rows(e4m3_rows(x[:, top]).T.float().contiguous()).T
        torch.testing.assert_close(model[0].weight.grad[:, top].double(), dw, rtol=1e-4, atol=1e-3)
        exact = g @ w
        error = ((x.grad - exact).norm() / exact.norm()).item()
        assert 0.02 < error < 0.35  # NVFP4, stochastic: of all channels


UPKEEP = {
    "Q-EMA": (QEma(decay=0.9, after=2),),
    "OsciReset": (OsciReset(start=2, every=8, window=3, ratio=2.0),),
    "Q-Ramping": (QRamping(every=8, window=3, ratio=1.0, gain=1.0),),
    "OutControl": (OutControl(fb.recipes.get("tetrajet2-full").upkeep[1].high, 0.25, start=1, steps=3),),
    "all": (
        QEma(decay=0.9, after=2),
        OsciReset(start=2, every=8, window=3, ratio=2.0),
        QRamping(every=8, window=3, ratio=1.0, gain=1.0),
        OutControl(fb.recipes.get("tetrajet2-full").upkeep[1].high, 0.25, start=1, steps=3),
    ),
}


def train(upkeep, steps=12, resume_at=None):
    """Losses and the weights in the end; with a checkpoint that is loaded on the way."""
    recipe = looked_after(*upkeep, spec=OUTER)

    def new():
        torch.manual_seed(0)
        model = fb.convert(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)), recipe)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        scheduler = fb.scheduler(model, recipe, steps)
        if scheduler:
            scheduler.attach(optimizer)
        return model, optimizer, scheduler

    parts = new()
    losses = []
    for step in range(steps):
        if step == resume_at:
            states = [part.state_dict() for part in parts]
            parts = new()
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(state)
        model, optimizer, scheduler = parts
        torch.manual_seed(step)
        x, y = torch.randn(32, 64), torch.randint(0, 32, (32,))
        if scheduler:
            scheduler.at(step)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach().clone() for p in parts[0].parameters()]


@pytest.mark.parametrize("name", list(UPKEEP))
def test_what_is_looked_after_survives_a_checkpoint_exactly(name):
    losses, weights = train(UPKEEP[name])
    assert losses != train(())[0]
    for resume_at in (1, 4, 6, 11):
        again = train(UPKEEP[name], resume_at=resume_at)
        assert again[0] == losses
        assert all(torch.equal(a, b) for a, b in zip(again[1], weights, strict=True))


def test_float_checkpoints_load_and_restore_takes_everything_away():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(32, 4))
    stored = {k: v.clone() for k, v in net.state_dict().items()}
    fb.convert(net, "tetrajet-qema")
    assert any(".quant.average.mean" in key for key in net.state_dict())
    net.load_state_dict(stored)
    assert set(fb.float_state_dict(net)) == set(stored)
    assert set(fb.restore(net).state_dict()) == set(stored)


def test_a_training_without_a_scheduler_is_refused_at_its_second_step():
    for name in ("tetrajet-qema", "tetrajet2-oscireset"):
        net = fb.convert(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4)), name)
        net(torch.randn(4, 64)).sum().backward()
        with pytest.raises(UserError, match=r"call scheduler\.at\(step\)"):
            net(torch.randn(4, 64))
        assert fb.scheduler(net, name, 10) is not None and net.eval()(torch.randn(4, 64)).isfinite().all()
    net = fb.convert(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4)), "tetrajet-qramping")
    with pytest.raises(UserError, match=r"call scheduler\.attach\(optimizer\)"):
        fb.scheduler(net, "tetrajet-qramping", 10).at(0)


def test_upkeep_where_it_cannot_be_is_refused():
    turned = fb.QuantSpec("int4_sym", fb.Amax(), transform=Hadamard(16))
    for make, says in (
        (lambda: QEma(decay=1.0), "a decay between 0 and 1"),
        (lambda: OsciReset(window=300), "windows lie apart"),
        (lambda: QRamping(window=0), "windows lie apart"),
        (lambda: OutControl(share=2.0), "a share between 0 and 1"),
        (lambda: looked_after(QEma(), QEma(decay=0.5)), "each kind of upkeep is there once"),
        (lambda: linear(looked_after(QEma(), spec=fb.LayerSpec(turned, turned))), "without rotation and clip value"),
        (lambda: fb.convert(nn.Sequential(nn.LSTM(32, 32)), looked_after(QEma())), "has none of its own"),
        (lambda: fb.convert(nn.Conv2d(32, 32, 1), looked_after(OutControl())), "OutControl is for linear layers"),
    ):
        with pytest.raises(UserError, match=says):
            make()


def test_pages_and_explanations_say_what_is_looked_after():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4))
    assert "rounded to the side of their average (Q-EMA, decay 0.9983) from step 10 on" in str(
        fb.explain(net, "tetrajet-qema")
    )
    assert "the 10 % of the channels of x" in str(fb.explain(net, "tetrajet2-full"))


def test_a_convolution_s_weight_is_looked_after_too():
    net = fb.convert(nn.Sequential(nn.Conv2d(32, 8, 3)), looked_after(QEma(decay=0.5, after=0)))
    scheduler = fb.scheduler(net, looked_after(QEma(decay=0.5, after=0)), 10)
    scheduler.at(0)
    with torch.no_grad():
        net[0].weight.add_(0.05 * torch.randn_like(net[0].weight))
    scheduler.at(1)
    x = torch.randn(2, 32, 6, 6)
    plain = F.conv2d(x, nearest_weight(net[0], net[0].weight), net[0].bias)
    assert not torch.allclose(net(x), plain, atol=1e-2)
