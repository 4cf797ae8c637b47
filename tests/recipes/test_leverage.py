"""Recipe int4-lss: bit splitting and leverage-score sampling, against their arithmetic written out number by number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fourbit as fb
from fourbit import UserError
from fourbit.ops import LayerState, LinearMap
from fourbit.ops._leverage import sampled, thresholds
from fourbit.ops._product import Operand
from fourbit.quantizers import Hadamard, random_words, stream_key

TURN = Hadamard(32)
PAIR = fb.formats.get("int4_pair")


def layer(kind=nn.Linear) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Linear(64, 24, bias=False) if kind is nn.Linear else nn.Conv2d(64, 24, 1, bias=False)
    return fb.convert(nn.Sequential(net, nn.Linear(24, 4)), "int4-lss", seed=5)[0]


def probabilities(scores: list[float], total: float) -> list[float]:
    """As the paper's code finds them: what is above 1 becomes 1, and the others share what is left."""
    p = [v * total / sum(scores) for v in scores]
    while max(p) > 1:
        p = [min(v, 1.0) for v in p]
        small = sum(v for v in p if v < 1)
        if not small:
            break
        share = (total - sum(v == 1 for v in p)) / small
        p = [v * share if v < 1 else v for v in p]
    return p


def split(v: float) -> tuple[int, int]:
    """high and low of a number of the pair."""
    high = round(v / 14)
    return high, int(v) - 14 * high


def kept_rows(q: list[list[float]], x: list[list[float]] | None, key: int) -> list[list[float]]:
    """The rows that are kept, divided by their probability, float64."""
    parts = [[[split(v)[part] * (14, 1)[part] for v in row] for row in q] for part in (0, 1)]
    scores = [math.sqrt(sum(v * v for v in row)) for part in parts for row in part]
    if x is not None:
        scores = [v * math.sqrt(sum(u * u for u in x[i % len(q)])) for i, v in enumerate(scores)]
    p = probabilities(scores, len(q))
    words = [w & 0xFFFFFFFF for w in random_words(key, (len(scores),)).tolist()]
    factors = [1 / v if v and w < v * 2**32 else 0.0 for v, w in zip(p, words, strict=True)]
    N = len(q)
    return [[parts[0][i][k] * factors[i] + parts[1][i][k] * factors[N + i] for k in range(len(q[0]))] for i in range(N)]


def test_every_number_of_the_pair_is_fourteen_high_plus_low_with_both_in_four_bits():
    for v in range(-98, 99):
        high, low = split(v)
        assert 14 * high + low == v and max(abs(high), abs(low)) <= 7
    assert PAIR.min == -98 and PAIR.max == 98


@pytest.mark.parametrize("total", [1.0, 4.0, 7.0])
def test_probabilities_are_those_of_the_papers_code_and_sum_to_what_is_asked_for(total):
    torch.manual_seed(0)
    for scores in (torch.rand(8), torch.rand(8) ** 8 + 0.01, torch.tensor([9.0] + [1.0] * 7)):
        ours = thresholds(scores.double(), total).double() / 2**32
        torch.testing.assert_close(ours, torch.tensor(probabilities(scores.tolist(), total), dtype=torch.float64))
        assert abs(float(ours.sum()) - total) < 1e-8
    few = thresholds(torch.tensor([3.0, 0.0, 0.0, 1.0], dtype=torch.float64), 3.0)
    assert (few == torch.tensor([2**32, 0, 0, 2**32])).all()
    assert not thresholds(torch.zeros(4, dtype=torch.float64), 2.0).any()


def stochastic(x: float, word: int) -> int:
    """One of the two neighbours of x, by the upper 24 bits of the word."""
    low = math.floor(x)
    return low + (((word >> 8) % 2**24) < 2**24 * (x - low))


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_gradients_are_those_of_the_rows_that_are_kept_number_by_number(kind):
    q = layer(kind)
    torch.manual_seed(1)
    x, g = torch.randn(6, 64), torch.randn(6, 24) * torch.logspace(-2, 0, 6)[:, None]
    ours = (x if kind is nn.Linear else x[:, :, None, None]).clone().requires_grad_()
    y = q(ours)
    y.backward(g.view(y.shape))
    counter, scale = q.quant.counter, g.abs().max() / 98
    words = random_words(stream_key(counter.key("g_dgrad"), 0), g.shape).tolist()
    exact = (g * scale.reciprocal()).double().tolist()
    gq = [[stochastic(v, w) for v, w in zip(*rows, strict=True)] for rows in zip(exact, words, strict=True)]
    steps = q.quant.x_step.item(), q.quant.w_step.item()
    operands = zip((x, q.weight.detach().view(24, 64)), steps, strict=True)
    turned = [TURN.apply(t).double() / step for t, step in operands]
    xq, wq = ([[max(-7, min(7, round(v))) for v in row] for row in t.tolist()] for t in turned)
    gw = torch.tensor(kept_rows(gq, xq, counter.row_key("wgrad")), dtype=torch.float64)
    gx = torch.tensor(kept_rows(gq, None, counter.row_key("dgrad")), dtype=torch.float64)
    dx = gx @ torch.tensor(wq, dtype=torch.float64) * steps[1] * float(scale) * (turned[0].abs() <= 7)
    dw = gw.T @ torch.tensor(xq, dtype=torch.float64) * steps[0] * float(scale) * (turned[1].abs() <= 7)
    assert (gx == 0).any() and not torch.equal(gx, gw)
    for found, expected in ((ours.grad, dx), (q.weight.grad, dw)):
        torch.testing.assert_close(found.view(expected.shape), TURN.undo(expected.float()), rtol=2e-5, atol=2e-6)


def test_the_mean_over_random_words_is_the_gradient():
    torch.manual_seed(2)
    numbers = torch.randint(-98, 99, (5, 4)).float()
    numbers[0] *= 0.02
    numbers = numbers.round()
    a, x = Operand(numbers, None, PAIR), Operand(torch.randn(5, 3))
    for other in (None, x):
        found = torch.stack([sampled(a, LinearMap(), 0.5, key, other).q for key in range(400)]).double()
        error = (found.mean(0) - numbers).abs()
        assert (error <= 5 * found.std(0) / math.sqrt(400) + 1e-6).all()
        assert (found.std(0) > 0).any()


def test_half_of_the_rows_are_kept_on_average():
    numbers = torch.ones(50, 2) * 15  # high 1, low 1
    found = torch.stack([sampled(Operand(numbers, None, PAIR), LinearMap(), 0.5, k, None).q for k in range(200)])
    assert abs(float(found.mean()) / 15 - 1) < 0.02
    assert len(found.unique()) == 4  # of both parts: none, one, the other, both


def test_words_replay_and_differ_between_products_and_steps():
    twins = [layer(), layer()]
    x, grads = torch.randn(8, 64), []
    for net in twins:
        for _ in range(2):
            net.weight.grad = None
            y = net(x)
            y.backward(torch.ones_like(y) * torch.linspace(0.1, 1, 8)[:, None])
            grads.append(net.weight.grad.clone())
    assert torch.equal(grads[0], grads[2]) and torch.equal(grads[1], grads[3]) and not torch.equal(grads[0], grads[1])
    counter = twins[0].quant.counter
    assert counter.row_key("dgrad") != counter.row_key("wgrad")


def test_where_it_cannot_be_leverage_is_refused():
    spec = fb.QuantSpec("int4_pair", fb.Amax(), leverage=0.5)
    with pytest.raises(UserError, match="leverage is for formats of two parts, such as int4_pair, not int8_sym"):
        fb.QuantSpec("int8_sym", fb.Amax(), leverage=0.5)
    with pytest.raises(UserError, match="leverage is a share above 0"):
        fb.QuantSpec("int4_pair", fb.Amax(), leverage=0.0)
    with pytest.raises(UserError, match="leverage is for scales of the tensor"):
        fb.QuantSpec("int4_pair", fb.Amax(), "row", leverage=0.5)
    with pytest.raises(UserError, match="w_fprop: leverage is for gradients"):
        fb.LayerSpec(w_fprop=spec)
    x = torch.randn(2, 3, 4, requires_grad=True)
    with pytest.raises(UserError, match="leverage is for layers with weights"):
        product = fb.LayerSpec(g_dgrad=spec)
        fb.nn.functional.matmul(x, torch.randn(2, 4, 5), product, state=LayerState(product)).sum().backward()
    net = fb.convert(nn.Linear(64, 8), fb.Recipe("mine", (fb.Rule(fb.LayerSpec(g_dgrad=spec)),)))
    v = torch.randn(3, 64, requires_grad=True)
    (dv,) = torch.autograd.grad(net(v).square().sum(), v, create_graph=True)
    with pytest.raises(UserError, match="a gradient of sampled rows cannot be differentiated"):
        dv.sum().backward()
