"""LSQ against autograd in float64 of its definition."""

import math

import pytest
import torch
from torch import nn

import fourbit as fb
from fourbit import UserError
from fourbit.quantizers import Hadamard, StepSize


def lsq(x, s):
    """x ~ s clip(round(x / s)), with the straight-through gradients of the paper, by autograd."""
    scale = 1 / math.sqrt(x.numel() * 7)
    step = s * scale + (s - s * scale).detach()
    inside = (x / step).clamp(-7, 7)
    return (inside + (inside.round() - inside).detach()) * step


@pytest.mark.parametrize("transform", [None, Hadamard(32)], ids=str)
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_gradients_of_operands_and_step_sizes_are_those_of_autograd(kind, transform):
    torch.manual_seed(0)
    spec = fb.QuantSpec("int4_sym", StepSize(), transform=transform)
    net = nn.Linear(64, 24, bias=False) if kind is nn.Linear else nn.Conv2d(64, 24, 1, bias=False)
    layer = fb.convert(nn.Sequential(net), fb.Recipe("mine", (fb.Rule(fb.LayerSpec(spec, spec)),)))[0]
    x = torch.randn(40, 64) * 2
    x[0, :8] *= 9
    ours = (x if kind is nn.Linear else x[:, :, None, None]).clone().requires_grad_()
    g = torch.randn(40, 24)
    y = layer(ours).flatten(1)
    y.backward(g)
    turn = (lambda t: t) if transform is None else (lambda t: t @ transform.apply(torch.eye(64)).double())
    xd = x.double().requires_grad_()
    wd = layer.weight.detach().double().view(24, 64).requires_grad_()
    steps = [2 * turn(t.detach()).abs().mean() / math.sqrt(7) for t in (xd, wd)]
    sx, sw = (s.clone().requires_grad_() for s in steps)
    expected = lsq(turn(xd), sx) @ lsq(turn(wd), sw).T
    expected.backward(g.double())
    torch.testing.assert_close(layer.quant.x_step.double(), sx.view(1).detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.grad.double().view(40, 64), xd.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad.double().view(24, 64), wd.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.quant.x_step.grad.double(), sx.grad.view(1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.quant.w_step.grad.double(), sw.grad.view(1), rtol=1e-3, atol=1e-4)


def test_step_sizes_stay_positive_and_are_in_checkpoints_and_groups():
    net = fb.convert(nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 4)), "int4-qat")
    assert (
        net.eval()(torch.randn(4, 32)).isfinite().all() and net[0].quant.x_step.item() == 0.0
    )  # evaluation decides nothing
    net.train()(torch.randn(4, 32)).sum().backward()
    assert {"0.quant.x_step", "0.quant.w_step"} <= set(net.state_dict())
    with torch.no_grad():
        net[0].quant.x_step.neg_()
    before = net[0].quant.x_step.item()
    net(torch.randn(4, 32))
    assert net[0].quant.x_step.item() == -before > 0
    assert any(p is net[0].quant.x_step for group in fb.param_groups(net) for p in group["params"])
    twin = fb.convert(nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 4)), "int4-qat")
    twin.load_state_dict(net.state_dict())
    x = torch.randn(4, 32)
    assert torch.equal(twin.eval()(x), net.eval()(x))


def test_step_sizes_where_they_cannot_be_are_refused():
    with pytest.raises(UserError, match="one step size per layer"):
        fb.QuantSpec("int4_sym", StepSize(), "row")
    net = fb.convert(nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 4)), "int4-qat")
    with pytest.raises(Exception, match=r"torch\.compile does not take layers with a learned step size"):
        torch.compile(net, backend="aot_eager", fullgraph=True)(torch.randn(4, 32))
