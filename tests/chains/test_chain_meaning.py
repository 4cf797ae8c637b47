"""A converted model computes what its own `forward` says, with chains as without them.

Each model below does something in `forward`, or has something done to it, that a chain must not change. It is run with
`fuse=True` and with `fuse=False`, for several steps, and everything that can be seen of it is compared.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import random
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fourbit as fb
from fourbit.chains import watch_chains
from fourbit.ops import Pending
from fourbit.recipes import catalog


class Net(nn.Module):
    """Two chains, with a residual; what `middle` does between them is the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm, self.act = nn.BatchNorm2d(16), nn.ReLU()
        self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm2, self.act2 = nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        self.last = nn.Conv2d(16, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        h = self.act(self.norm(self.stem(x)))
        h = self.act2(self.norm2(self.conv(h)) + h)
        return self.head(self.last(h).mean((2, 3)))


class NoGrad(Net):
    def forward(self, x):
        with torch.no_grad():
            h = self.act(self.norm(self.stem(x)))
        return self.head(self.last(self.act2(self.norm2(self.conv(h)) + h)).mean((2, 3)))


class NoGradInside(Net):
    def forward(self, x):
        h = self.norm(self.stem(x))
        with torch.no_grad():
            self.mean = h.square().mean()
        h = self.act(h)
        h = self.act2(self.norm2(self.conv(h)) + h)
        return self.head(self.last(h).mean((2, 3))) + self.mean


class Autocast(Net):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


class Checkpointed(Net):
    reentrant = False

    def block(self, h):
        return self.act2(self.norm2(self.conv(h)) + h)

    def forward(self, x):
        h = self.act(self.norm(self.stem(x)))
        h = checkpoint(self.block, h, use_reentrant=self.reentrant)
        return self.head(self.last(h).mean((2, 3)))


class Reentrant(Checkpointed):
    reentrant = True


class Auxiliary(Net):
    """Features, counters and a loss of its own."""

    calls = 0

    def forward(self, x):
        h = self.norm(self.stem(x))
        self.features = {"norm": h}
        h = self.act(h)
        self.aux = h.square().mean()
        self.calls += 1
        y = self.norm2(self.conv(h))
        self.features["sum"] = y = y + h
        return self.head(self.last(self.act2(y)).mean((2, 3)))


class RandomDepth(Net):
    def forward(self, x):
        h = self.act(self.norm(self.stem(x)))
        if random.random() < 0.5 or torch.rand(()).item() < 0.2:
            h = self.act2(self.norm2(self.conv(h)) + h)
        return self.head(self.last(h + 0.1 * torch.randn(1, 16, 1, 1)).mean((2, 3)))


class Branches(Net):
    """Data decide, and where values lie."""

    def forward(self, x):
        box = {"h": self.act(self.norm(self.stem(x)))}
        assert isinstance(box["h"], Tensor)
        h = [self.conv(box["h"])]
        h = self.norm2(h[0]) if x.mean() > 0 else self.norm2(h[0]) * 0.5
        h = self.act2(h + box.pop("h"))
        return self.head(self.last(h).mean((2, 3)))


class TwoNorms(Net):
    """One product, two normalizations, and itself."""

    def forward(self, x):
        y = self.stem(x)
        h = self.act(self.norm(y)) + self.norm2(y) + 0.1 * y
        return self.head(self.last(h).mean((2, 3)))


class InPlace(Net):
    def forward(self, x):
        h = self.norm(self.stem(x))
        h.mul_(0.5).clamp_(-1, 1)
        z = self.norm2(self.conv(h))
        z[:, :2] = 0.0
        z += h
        return self.head(self.last(self.act2(z)).mean((2, 3)))


class ReadBetween(Net):
    """Running statistics have moved when batch_norm has returned."""

    def forward(self, x):
        h = self.norm(self.stem(x))
        self.seen = (self.norm.running_mean.clone(), int(self.norm.num_batches_tracked))
        h = self.act(h)
        h = self.act2(self.norm2(self.conv(h)) + h)
        return self.head(self.last(h).mean((2, 3))) + self.seen[0].sum()


class ChangedBetween(Net):
    """What happens to the normalization's parameters afterwards is none of this batch's business."""

    def forward(self, x):
        h = self.norm(self.stem(x))
        with torch.no_grad():
            self.norm.weight.data, self.norm.bias.data = self.norm.weight.data * 1.5, self.norm.bias.data + 1.0
        return self.head(self.last(self.act(h)).mean((2, 3)))


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -0.5 * g


class Unchanged(torch.autograd.Function):
    """Returns its input as it is."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g + 0.01 * x


class Reads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2 + x.mean()

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Functions(Net):
    """Autograd functions of the user's own, at every place of a chain."""

    places: tuple[str, ...] = ()
    function: Any = Reversal

    def own(self, place: str, x: Tensor) -> Tensor:
        return self.function.apply(x) if place in self.places else x

    def forward(self, x):
        h = self.own("norm", self.norm(self.own("conv", self.stem(x))))
        h = self.own("act", self.act(h))
        y = self.own("sum", self.norm2(self.conv(h)) + h)
        return self.head(self.last(torch.relu(y)).mean((2, 3)))


def functions(function: Any, *places: str) -> type[Net]:
    return type("Functions", (Functions,), {"function": function, "places": places})


class TensorHooks(Net):
    """Hooks on tensors, gradients kept, of tensors that nobody holds any longer in backward."""

    def forward(self, x):
        self.grads: list[Tensor] = []
        a = self.stem(x)
        h = self.norm(a)
        h.register_hook(lambda g: self.grads.append(g.clone()))
        h = self.act(h)
        y = self.conv(h)
        h.register_hook(lambda g: g * 0.5)
        h = self.act2(self.norm2(y) + h)
        out = self.last(h)
        h.retain_grad()
        self.kept = h
        return self.head(out.mean((2, 3)))


class Reused(Net):
    """The layers of a chain are called twice."""

    def forward(self, x):
        h = self.act(self.norm(self.stem(x)))
        for _ in range(2):
            h = self.act2(self.norm2(self.conv(h)) + h)
        return self.head(self.last(h).mean((2, 3)))


class Twice(Net):
    """A sum of a tensor with itself, and with a number."""

    def forward(self, x):
        h = self.norm(self.stem(x))
        h = self.act(h + h) + 1
        h = self.act2(1.0 + self.norm2(self.conv(h)))
        return self.head(self.last(h).mean((2, 3)))


class Broadcast(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 16, 1, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        h = self.act(self.norm(self.stem(x)) + self.bias)
        h = self.act2(self.norm2(self.conv(self.pool(h))) + h)
        h = h + self.norm2(self.conv(h)).mean((2, 3), keepdim=True)
        return self.head(self.last(h).mean((2, 3)))


class Outputs(Net):
    """Results of every kind of step leave the model."""

    def forward(self, x):
        a = self.stem(x)
        b = self.norm(a)
        c = self.act(b)
        d = self.norm2(self.conv(c)) + c
        self.all = (a, b, c, d)
        return self.head(self.last(d).mean((2, 3))) + sum(t.mean() for t in self.all)


MODELS: dict[str, type[Net]] = {
    "plain": Net,
    "no_grad": NoGrad,
    "no_grad inside a chain": NoGradInside,
    "autocast": Autocast,
    "checkpoint": Checkpointed,
    "reentrant checkpoint": Reentrant,
    "features and losses on self": Auxiliary,
    "random branches and noise": RandomDepth,
    "branches on data, values in containers": Branches,
    "two normalizations of one product": TwoNorms,
    "changes in place": InPlace,
    "statistics read between": ReadBetween,
    "parameters changed between": ChangedBetween,
    "gradient reversal": functions(Reversal, "conv", "norm", "act", "sum"),
    "gradient reversal behind a normalization": functions(Reversal, "norm"),
    "a function that returns its input": functions(Unchanged, "norm", "sum"),
    "the same behind an activation": functions(Unchanged, "conv", "act"),
    "a function that computes": functions(Reads, "conv", "norm", "act", "sum"),
    "hooks on tensors": TensorHooks,
    "layers used twice": Reused,
    "sums with itself and with numbers": Twice,
    "sums that broadcast": Broadcast,
    "results of every step": Outputs,
}


def batch(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(6, 3, 8, 8, generator=g), torch.randint(0, 4, (6,), generator=g)


def seen_of(model: nn.Module, step: int) -> dict[str, Any]:
    """Run a training step; everything that can be seen afterwards."""
    x, y = batch(step)
    random.seed(step)
    torch.manual_seed(step)
    model.zero_grad()
    x.requires_grad_()
    out = model(x)
    loss = F.cross_entropy(out, y)
    if hasattr(model, "aux"):
        loss = loss + model.aux
    loss.backward()
    found: dict[str, Any] = {"out": out, "grad of x": x.grad}
    found |= {f"grad of {n}": p.grad for n, p in model.named_parameters()}
    found |= {n: b for n, b in model.named_buffers() if "quant" not in n}
    for name in ("features", "seen", "all", "grads", "kept", "mean", "calls"):
        found |= {f"{name} {i}": v for i, v in enumerate(_flat(getattr(model, name, ())))}
    if hasattr(model, "kept"):
        found["grad of kept"] = model.kept.grad
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in found.items()}


def _flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, tuple | list) else [value]


def same(fused: dict[str, Any], plain: dict[str, Any], limit: float = 3e-2) -> None:
    """Sums are taken in another order, so that now and then a code differs."""
    assert fused.keys() == plain.keys()
    for name, b in plain.items():
        a = fused[name]
        assert type(a) is type(b), name
        if isinstance(b, Tensor):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            error = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-9))
            assert error < limit, (name, error)
        else:
            assert a == b, name


FORWARD = fb.Recipe("forward", (fb.Rule(catalog.INT4_FORWARD),))
"""Every layer in INT4 forward, gradients in full precision."""


def make(cls: type[nn.Module], fuse: bool, recipe: str | fb.Recipe = FORWARD) -> nn.Module:
    torch.manual_seed(0)
    return fb.convert(cls(), recipe, fuse=fuse)


@pytest.mark.parametrize("cls", MODELS.values(), ids=MODELS)
def test_forward_means_what_it_says_from_the_first_step_on(cls):
    plain, fused = make(cls, False), make(cls, True)
    for step in range(3):
        same(seen_of(fused, step), seen_of(plain, step))
    for model in (plain, fused):
        model.eval()
    random.seed(0), torch.manual_seed(0)
    a = plain(batch(9)[0])
    random.seed(0), torch.manual_seed(0)
    torch.testing.assert_close(fused(batch(9)[0]), a, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cls", [Net, Auxiliary, TensorHooks, functions(Reversal, "norm")])
def test_gradients_in_four_bits_follow(cls):
    """With 4-bit gradients a code that differs is a large difference: most of the numbers must agree."""
    plain, fused = make(cls, False, "ibm2020"), make(cls, True, "ibm2020")
    for step in range(3):
        same(seen_of(fused, step), seen_of(plain, step), limit=0.2)


def test_a_chain_is_fused_at_all():
    """Else nothing above says anything."""
    model = make(Net, True)
    seen_of(model, 0)
    found = []
    with watch_chains(lambda link, end: found.append((link.kind, end))):
        seen_of(model, 1)
    assert [kind for kind, _ in found if kind != "product"] == ["act", "act"]
    assert [end for kind, end in found if kind == "act"] == [model.conv.quant, model.last.quant]


# ---- what is done to a model from outside ----


def _replace_activation(m: Net) -> None:
    m.act, m.act2 = nn.SiLU(), nn.GELU()


def _replace_norms(m: Net) -> None:
    m.norm, m.norm2 = nn.Identity(), nn.GroupNorm(4, 16)


def _append(m: Net) -> None:
    m.act = nn.Sequential(m.act, nn.Dropout(0.0), nn.Conv2d(16, 16, 1))


def _prune(m: Net) -> None:
    prune.l1_unstructured(m.conv, "weight", amount=0.5)
    prune.l1_unstructured(m.norm, "weight", amount=0.5)


def _freeze(m: Net) -> None:
    m.stem.weight.requires_grad_(False)
    m.norm.requires_grad_(False)
    m.norm2.weight.requires_grad_(False)


def _norms_in_evaluation(m: Net) -> None:
    m.norm.eval(), m.norm2.eval()


def _no_statistics(m: Net) -> None:
    m.norm, m.norm2 = nn.BatchNorm2d(16, affine=False), nn.BatchNorm2d(16, track_running_stats=False)


def _cumulative(m: Net) -> None:
    m.norm.momentum = None


def _reinitialise(m: Net) -> None:
    torch.manual_seed(5)
    nn.init.normal_(m.conv.weight, std=0.1), nn.init.constant_(m.norm.weight, 0.5)
    m.conv.weight = nn.Parameter(m.conv.weight.detach().clone())


def _own_forward(m: Net) -> None:
    m.norm.forward = lambda x: x * 0.5
    m.act.forward = torch.tanh


def _swap_modules(m: Net) -> None:
    m.norm, m.norm2 = m.norm2, m.norm


def _double_norm(m: Net) -> None:
    m.norm.double(), m.norm2.to(torch.bfloat16)
    m.norm.forward = lambda x, n=m.norm: nn.BatchNorm2d.forward(n, x.double()).float()
    m.norm2.forward = lambda x, n=m.norm2: nn.BatchNorm2d.forward(n, x.bfloat16()).float()


SURGERY = [
    _replace_activation,
    _replace_norms,
    _append,
    _prune,
    _freeze,
    _norms_in_evaluation,
    _no_statistics,
    _cumulative,
    _reinitialise,
    _own_forward,
    _swap_modules,
    _double_norm,
]


@pytest.mark.parametrize("operate", SURGERY)
def test_a_model_is_what_it_has_become(operate):
    plain, fused = make(Net, False), make(Net, True)
    for model in (plain, fused):
        seen_of(model, 0)
        torch.manual_seed(3)
        operate(model)
    for step in (1, 2):
        a, b = seen_of(fused, step), seen_of(plain, step)
        same({k: v for k, v in a.items() if v is not None}, {k: v for k, v in b.items() if v is not None})


HOOKS: dict[str, Callable[[nn.Module, list[Any]], Any]] = {
    "forward": lambda m, seen: m.register_forward_hook(lambda m, i, o: seen.append(o.detach().clone())),
    "forward, output replaced": lambda m, seen: m.register_forward_hook(lambda m, i, o: o * 0.5),
    "forward, output kept": lambda m, seen: m.register_forward_hook(lambda m, i, o: seen.append(o)),
    "forward pre": lambda m, seen: m.register_forward_pre_hook(lambda m, i: seen.append(i[0].detach().clone())),
    "forward pre, input replaced": lambda m, seen: m.register_forward_pre_hook(lambda m, i: (i[0] * 0.5,)),
    "full backward": lambda m, seen: m.register_full_backward_hook(lambda m, gi, go: seen.append(go[0].clone())),
    "full backward, gradient replaced": lambda m, seen: m.register_full_backward_hook(
        lambda m, gi, go: tuple(None if g is None else g * 0.5 for g in gi)
    ),
}


@pytest.mark.parametrize("target", ["stem", "norm", "act", "conv", "norm2", "last", ""])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_called_as_torch_calls_them(kind, target):
    if "backward" in kind and target == "norm2":
        pytest.skip("a sum is not in place, but torch refuses the activation in place behind a view")
    plain, fused = make(Net, False), make(Net, True)
    seen: dict[bool, list[Any]] = {False: [], True: []}
    found = {}
    for model, fuse in ((plain, False), (fused, True)):
        seen_of(model, 0)
        HOOKS[kind](model.get_submodule(target), seen[fuse])
        for step in (1, 2):
            found[fuse, step] = seen_of(model, step)
    for step in (1, 2):
        same(found[True, step], found[False, step])
    assert len(seen[True]) == len(seen[False])
    for a, b in zip(seen[True], seen[False], strict=True):
        assert isinstance(a, Tensor)
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-3, atol=1e-3)


def test_hooks_of_all_modules_see_every_module():
    called: dict[bool, list[str]] = {}
    for fuse in (False, True):
        model = make(Net, fuse)
        names = {m: n for n, m in model.named_modules()}
        seen_of(model, 0)
        found: list[str] = []
        handle = register_module_forward_hook(lambda m, i, o, names=names, found=found: found.append(names[m]))
        try:
            seen_of(model, 1)
        finally:
            handle.remove()
        called[fuse] = found
    assert called[True] == called[False] and len(called[True]) == 9


@pytest.mark.parametrize("ask", ["autograd.grad", "backward(inputs=)", "retain_grad", "gradient edge"])
@pytest.mark.parametrize("place", range(4))
def test_gradients_of_tensors_inside_a_chain_can_be_asked_for(ask, place):
    found = {}
    for fuse in (False, True):
        model = make(Outputs, fuse)
        seen_of(model, 0)
        x, y = batch(1)
        loss = F.cross_entropy(model(x), y)
        h = model.all[place]
        if ask == "autograd.grad":
            (found[fuse],) = torch.autograd.grad(loss, h)
        elif ask == "gradient edge":
            (found[fuse],) = torch.autograd.grad(loss, torch.autograd.graph.get_gradient_edge(h))
        elif ask == "retain_grad":
            h.retain_grad()
            loss.backward()
            found[fuse] = h.grad
        else:
            loss.backward(inputs=[h, model.head.weight])
            found[fuse] = h.grad
    error = float((found[True] - found[False]).norm() / found[False].norm())
    assert error < 1e-3


# ---- shapes that do not go together ----


class Wrong(Net):
    def __init__(self, features: int = 16, stride: int = 1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(features)
        self.conv = nn.Conv2d(16, 16, 3, stride, 1, bias=False)


@pytest.mark.parametrize("options", [{"features": 8}, {"features": 24}, {"stride": 2}])
def test_sizes_that_do_not_match_end_in_torchs_own_error(options):
    errors = []
    for convert in (False, True):
        torch.manual_seed(0)
        model = Wrong(**options)
        if convert:
            fb.convert(model, "ibm2020")
        with pytest.raises((RuntimeError, ValueError)) as caught:
            model(batch(0)[0])
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


def test_one_value_per_channel_ends_in_torchs_own_error():
    model = fb.convert(Net(), "ibm2020")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(torch.randn(1, 3, 1, 1))


def test_a_sum_whose_other_part_changed_before_it_was_computed_is_refused():
    class Changes(Net):
        def forward(self, x):
            h = self.act(self.norm(self.stem(x)))
            r = h * 2
            y = self.norm2(self.conv(h)) + r
            r.add_(1.0)
            return self.head(self.last(torch.relu(y)).mean((2, 3)))

    model = make(Changes, True)
    with pytest.raises(fb.UserError, match="changed in place before the sum was used"):
        model(batch(0)[0])


# ---- copies, traces, other modes ----


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_fused_and_independent(how):
    model = make(Net, True, "ibm2020")
    seen_of(model, 0)
    alive = model(batch(1)[0])  # a graph is alive
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    del alive
    same(seen_of(twin, 2), seen_of(model, 2), limit=1e-6)
    with torch.no_grad():
        twin.head.weight.zero_()
    assert model.head.weight.abs().max() > 0


def test_class_and_signature_are_the_users():
    model = make(Net, True)
    assert type(model) is Net
    assert inspect.signature(model.forward) == inspect.signature(Net().forward)
    parameters = [list(inspect.signature(m.forward).parameters) for m in (model.conv, nn.Conv2d(1, 1, 1))]
    assert parameters[0] == parameters[1]
    fb.restore(model)
    assert type(model) is Net and type(model.conv) is nn.Conv2d and not hasattr(model.conv, "quant")


def test_a_symbolic_trace_has_the_nodes_of_the_unconverted_model():
    plain, model = torch.fx.symbolic_trace(Net()), make(Net, True)
    traced = torch.fx.symbolic_trace(model)
    assert [(n.op, str(n.target)) for n in traced.graph.nodes] == [(n.op, str(n.target)) for n in plain.graph.nodes]
    model.eval(), traced.eval()
    x = batch(0)[0]
    assert torch.equal(traced(x), model(x))


def test_a_model_is_exported_as_it_computes():
    model = make(Net, True)
    seen_of(model, 0)
    model.eval()
    x = batch(1)[0]
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-4)


def test_what_torch_jit_cannot_do_is_said_in_a_sentence():
    model = make(Net, True).eval()
    for call in (lambda: torch.jit.trace(model, batch(0)[0]), lambda: torch.jit.script(model)):
        with pytest.raises(fb.UserError, match=r"use torch\.export, or take the conversion back"):
            call()


def test_a_result_is_a_plain_tensor_for_whoever_uses_it():
    model = make(Net, True)
    conv = nn.Sequential(model.stem, model.norm)
    for use in (
        lambda t: t.detach().numpy().sum(),
        lambda t: t.sum().item(),
        lambda t: repr(t),
        lambda t: t.data_ptr(),
        lambda t: torch.save(t, io.BytesIO()),
        lambda t: torch.cat([t, t]),
        lambda t: copy.copy(t),
        lambda t: t.tolist(),
        lambda t: t.untyped_storage(),
        lambda t: t.grad_fn,
    ):
        t = conv(batch(0)[0])
        assert isinstance(t, Pending) and isinstance(t, Tensor)
        use(t)
        assert type(t) is Tensor and t.requires_grad
    with pytest.raises(RuntimeError, match="Can't call numpy"):
        conv(batch(0)[0]).numpy()


def test_metadata_needs_no_numbers():
    model = make(Net, True)
    t, plain = model.stem(batch(0)[0]), make(Net, False).stem(batch(0)[0])
    assert isinstance(t, Pending)
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "is_cpu"):
        assert getattr(t, name) == getattr(plain, name), name
    assert (t.size(), t.stride(), t.numel(), len(t), t.dim()) == (
        plain.size(),
        plain.stride(),
        plain.numel(),
        len(plain),
        plain.dim(),
    )
    assert isinstance(t, Pending)


def test_part_of_a_model_can_be_compiled():
    found = {}
    for fuse in (False, True):
        model = make(Net, fuse)
        seen_of(model, 0)
        loss = torch.compile(lambda t: t.square().mean(), backend="aot_eager")
        h = model.norm(model.stem(batch(1)[0]))
        model.zero_grad()
        loss(h).backward()
        found[fuse] = model.stem.weight.grad
    torch.testing.assert_close(found[True], found[False], rtol=1e-3, atol=1e-6)


# ---- what a gradient, or a tensor, may go through between two uses ----


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.c2, self.n2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.c3 = nn.Conv2d(16, 8, 3, padding=1)


class Other(Tensor):
    """A class of tensors with operations of its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.add, Tensor.__add__, torch.add):
            return args[0].as_subclass(Tensor) - args[1].as_subclass(Tensor)
        return super().__torch_function__(func, types, args, kwargs or {})


def _in_place_without_gradients(m: Parts, x: Tensor) -> Any:
    h = m.n1(m.c1(x))
    with torch.no_grad():
        h.relu_()
        h += 2 * torch.ones_like(h)
    return m.c2(h).square().mean(), [h]


def _an_earlier_backward(m: Parts, x: Tensor) -> Any:
    h = torch.relu(m.n1(m.c1(x)))
    a, b = 100 * m.c2(h).square().mean(), h.mean()
    del h
    torch.autograd.grad(a, m.c2.weight, retain_graph=True)
    return b, []


def _an_earlier_backward_while_held(m: Parts, x: Tensor) -> Any:
    h = torch.relu(m.n1(m.c1(x)))
    a = m.c2(h).square().mean()
    torch.autograd.grad(a, m.c2.weight, retain_graph=True)
    return a, []


def _a_hook_on_what_was_taken(m: Parts, x: Tensor) -> Any:
    h = torch.relu(m.n1(m.c1(x)))
    y = m.n2(m.c2(h)) + h
    h.register_hook(lambda g: g * 3)
    return m.c3(y).square().mean(), []


def _a_node_of_what_was_taken(m: Parts, x: Tensor) -> Any:
    h = torch.relu(m.n1(m.c1(x)))
    y = m.c2(h)
    h.grad_fn.register_prehook(lambda gs: tuple(g * 3 for g in gs))
    return y.square().mean(), []


def _a_view_of_what_was_taken(m: Parts, x: Tensor) -> Any:
    with torch.no_grad():
        h = m.n1(m.c1(x))
        y = m.c2(h)
        h.view_as(h).mul_(3)
    return m.c3(h).square().mean() + y.mean(), [h]


def _another_class(m: Parts, x: Tensor) -> Any:
    r = torch.ones(6, 16, 8, 8).as_subclass(Other)
    return m.c2(m.n1(m.c1(x)) + r).square().mean() + m.c3(r + m.n1(m.c1(x))).mean(), []


def _data_set(m: Parts, x: Tensor) -> Any:
    h = m.n1(m.c1(x))
    y = torch.relu(h)
    h.data = h.data * 3
    return m.c2(y).square().mean() + m.c3(h).mean(), [h]


def _steps_in_a_checkpoint(m: Parts, x: Tensor) -> Any:
    h = m.n1(m.c1(x))
    return checkpoint(lambda t: m.c2(torch.relu(t)), h, use_reentrant=False).square().mean(), []


def _order_of_axes(m: Parts, x: Tensor) -> Any:
    y = torch.ones(6, 16, 8, 8) + m.n1(m.c1(x))
    return m.c2(y).square().mean() + y.view(6, -1).mean(), []


def _infinities(m: Parts, x: Tensor) -> Any:
    with torch.no_grad():
        m.n1.bias[:3] = torch.tensor([float("inf"), -float("inf"), 0.5])
    h = torch.relu(m.n1(m.c1(x)))
    return h[:, 2:].square().mean(), []


def _no_slope(m: Parts, x: Tensor) -> Any:
    with torch.inference_mode():
        h = torch.relu(m.n1(m.c1(x)))
    return m.c2(h.clone()).square().mean(), []


BETWEEN = [
    _in_place_without_gradients,
    _an_earlier_backward,
    _an_earlier_backward_while_held,
    _a_hook_on_what_was_taken,
    _a_node_of_what_was_taken,
    _a_view_of_what_was_taken,
    _another_class,
    _data_set,
    _steps_in_a_checkpoint,
    _order_of_axes,
    _infinities,
    _no_slope,
]


@pytest.mark.parametrize("do", BETWEEN, ids=[f.__name__.strip("_") for f in BETWEEN])
def test_between_two_uses_everything_is_as_torch_has_it(do):
    found = {}
    for fuse in (False, True):
        model = make(Parts, fuse)
        for step in range(3):
            x = batch(step)[0].requires_grad_()
            model.zero_grad()
            loss, tensors = do(model, x)
            kept = [t.detach().clone() for t in tensors]
            needs = [t.requires_grad for t in tensors]
            del tensors
            loss.backward()
        results = {"loss": loss.detach(), "x": x.grad, "needs": needs, **{f"tensor {i}": t for i, t in enumerate(kept)}}
        found[fuse] = results | {n: p.grad for n, p in model.named_parameters()}
    same(found[True], found[False])


def test_two_threads_may_use_one_result():
    model = make(Parts, True)
    for step in range(5):
        h = model.n1(model.c1(batch(step)[0]))
        results: list[float] = []
        threads = [
            threading.Thread(target=lambda h=h, k=k, results=results: results.append(float((h * k).detach().mean())))
            for k in (1, 2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 2


def test_attributes_that_a_user_gives_a_result_stay():
    model = make(Parts, True)
    h = model.n1(model.c1(batch(0)[0]))
    h.tag = 5
    h.mean()
    assert h.tag == 5 and type(h) is Tensor


def test_an_eps_that_torch_refuses_is_refused():
    model = make(Parts, True)
    model.n1.eps = 0.0
    errors = []
    for fuse in (True, False):
        model.c1.quant.fuse = fuse
        try:
            model.n1(model.c1(batch(0)[0]))
            errors.append("")
        except ValueError as error:
            errors.append(str(error))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("how", ["profiler", "weak references"])
def test_what_is_looked_at_from_below_python_trains_as_before(how: str):
    """Torch's profiler, with shapes, has hold of every tensor that goes into an operation; so have others."""

    def losses(watched: bool) -> list[float]:
        torch.manual_seed(0)
        model = fb.convert(fb.models.build("mobilenet_v2?width=0.25", num_classes=5), "ibm2020")
        optimizer = torch.optim.SGD(fb.param_groups(model, 1e-4), lr=0.01)
        refs: list[Any] = []
        if watched and how == "weak references":
            for module in model.modules():
                module.register_forward_hook(lambda m, inputs, y: refs.append(torch._C._WeakTensorRef(y)))
        found = []
        for step in range(2):
            x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))
            with torch.profiler.profile(record_shapes=True) if watched and how == "profiler" else nullcontext():
                loss = F.cross_entropy(model(x), torch.arange(4))
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    assert losses(True) == losses(False)
