"""`memory_report`: bytes worked out by hand, nothing of the model changed, and memory that is freed when it should be."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fourbit as fb
from fourbit import backends, formats, recipes
from fourbit.cli import main
from fourbit.ops import SLOTS, LayerSpec
from fourbit.quantizers import Amax, QuantSpec, Rounding, StepSize
from fourbit.recipes.catalog import variants

TPR = recipes.get("ibm2020").rules[-1].spec
LUQ = recipes.get("luq").rules[-1].spec
FP16 = recipes.get("ibm2020").rules[0].spec
SCALE = 4  # one float32


def blocks(n: int) -> int:
    """Blocks of 64 elements, the last one filled up."""
    return -(-n // 64)


@pytest.mark.parametrize("kernels", [True, False])
def test_a_linear_layer_keeps_half_a_byte_per_code_and_a_bit_per_clipped_element(kernels):
    x, w = 50 * 24, 10 * 24
    net = nn.Sequential(fb.nn.Linear(24, 10, spec=TPR))
    with nullcontext() if kernels else backends.without():
        (layer,) = fb.memory_report(net, (50, 24)).layers
    assert (layer.name, layer.type, layer.bits) == ("0", "Linear", 4)
    assert layer.fp32_bytes == 4 * (x + w) and layer.bf16_bytes == 2 * (x + w)
    assert layer.saved_bytes == 32 * blocks(x) + 8 * blocks(x) + 32 * blocks(w) + 2 * SCALE
    assert layer.float_bytes == 2 * SCALE


def test_a_convolution_keeps_the_same():
    x, w = 8 * 16 * 12 * 12, 32 * 16 * 9
    net = nn.Sequential(fb.nn.Conv2d(16, 32, 3, padding=1, spec=TPR))
    (layer,) = fb.memory_report(net, (8, 16, 12, 12)).layers
    assert layer.saved_bytes == 40 * blocks(x) + 32 * blocks(w) + 2 * SCALE
    assert layer.fp32_bytes == 4 * (x + w)


def test_sawb_activations_need_no_mask():
    x, w = 64 * 64, 64 * 64
    (layer,) = fb.memory_report(nn.Sequential(fb.nn.Linear(64, 64, spec=LUQ)), (64, 64)).layers
    assert layer.saved_bytes == x // 2 + w // 2 + 2 * SCALE and layer.ratio == pytest.approx(0.125, rel=1e-2)


def test_sixteen_bit_and_full_precision_operands_are_kept_as_float32():
    for spec, bits in ((FP16, 16), (LayerSpec(g_dgrad=QuantSpec("fp8_152", Amax())), 32)):
        (layer,) = fb.memory_report(nn.Sequential(fb.nn.Linear(64, 64, spec=spec)), (64, 64)).layers
        assert layer.bits == bits and layer.ratio == pytest.approx(1.0, rel=1e-3)


NARROW = [format for format in formats.CATALOG.values() if format.bits <= 4]


@pytest.mark.parametrize("rounding", list(Rounding), ids=lambda r: r.value)
@pytest.mark.parametrize("format", NARROW, ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_no_format_of_four_bits_is_kept_as_anything_but_codes(format, rounding, granularity):
    x = QuantSpec(format, Amax(), granularity, rounding)
    spec = LayerSpec(x_fprop=x, w_fprop=QuantSpec(format, Amax(), rounding=rounding), x_wgrad=x)
    for layer, shape in (
        (fb.nn.Linear(64, 32, spec=spec), (128, 64)),
        (fb.nn.Conv2d(64, 8, 3, spec=spec), (2, 64, 9, 9)),
    ):
        (found,) = fb.memory_report(nn.Sequential(layer), shape).layers
        assert found.ratio <= 0.17
        assert found.float_bytes == SCALE + (SCALE if granularity == "tensor" else 64 * SCALE)


LAYERS = {
    "Conv1d": (lambda: nn.Conv1d(16, 16, 3), (8, 16, 30)),
    "Conv2d": (lambda: nn.Conv2d(16, 16, 3), (8, 16, 9, 9)),
    "1x1": (lambda: nn.Conv2d(16, 16, 1), (8, 16, 9, 9)),
    "grouped": (lambda: nn.Conv2d(16, 16, 3, groups=4), (8, 16, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(16, 16, 3, groups=16), (8, 16, 9, 9)),
    "Conv3d": (lambda: nn.Conv3d(8, 8, 3), (4, 8, 6, 6, 6)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(16, 16, 3), (8, 16, 30)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(16, 16, 3), (8, 16, 9, 9)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(8, 8, 3), (4, 8, 6, 6, 6)),
    "Linear": (lambda: nn.Linear(64, 64), (8, 9, 64)),
}
FEW = ("ibm2020", "ibm2020-channel-gradscale", "luq", "luq-smp2")
"""A scale per tensor, per channel, one sample of stochastic rounding, and two: what a layer's geometry may matter to."""


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS.keys())
def test_every_kind_of_layer_keeps_at_most_0_17_of_fp32(case):
    make, shape = case
    names = set(recipes.names()) - set(variants.NAMES) if case in (LAYERS["Conv2d"], LAYERS["Linear"]) else FEW
    specs = {r.spec for name in names for r in recipes.get(name).rules if r.spec is not None}
    specs -= {s for s in specs if any(map(s.transform, SLOTS))}  # rotations have sizes of their own
    learned = {s for s in specs if s.x_fprop is not None and isinstance(s.x_fprop.scaling, StepSize)}
    for spec in specs - learned:  # whose gradient needs the operands themselves
        net = fb.convert(nn.Sequential(make()), fb.Recipe("all", (fb.Rule(spec),)))
        for _ in range(2):  # before and after the first training step
            (layer,) = fb.memory_report(net, shape).layers
            assert layer.bits > 4 or layer.ratio <= 0.17, spec
            net(torch.randn(shape)).sum().backward()


def test_a_network_s_total_is_its_layers_and_everything_else_each_piece_of_memory_once():
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8, bias=False))
    before = fb.memory_report(net, (32, 8))
    # x; BatchNorm's input; ReLU's output, which is the second layer's input; that layer's weights (the first computes no dx);
    # BatchNorm's weight, mean and 1/std, perhaps running mean and variance
    activations = 4 * 32 * 8
    small = 4 * 8
    assert not before.layers and before.others["Linear"] == activations + 4 * 64
    assert before.others["ReLU"] == activations
    assert activations + 3 * small <= before.others["BatchNorm1d"] <= activations + 5 * small
    assert before.total == sum(before.others.values())
    fb.convert(net, fb.Recipe("mine", (fb.Rule(TPR, where=fb.last(1)), fb.Rule(None))))
    after = fb.memory_report(net, (32, 8))
    assert after.total == after.layers[0].saved_bytes + sum(after.others.values())
    assert after.others["ReLU"] == activations  # its own backward needs it, whatever the next layer keeps
    assert after.ratio() == after.ratio(4) == after.layers[0].ratio < 0.17 and after.ratio(16) == 0.0


def test_a_layer_that_is_used_twice_counts_both_inputs_and_its_weights_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fb.nn.Linear(16, 16, bias=False, spec=LUQ)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    (layer,) = fb.memory_report(Twice(), (64, 16)).layers
    assert layer.fp32_bytes == 4 * (2 * 64 * 16 + 16 * 16)
    assert layer.saved_bytes == 2 * (64 * 16 // 2 + 16 * 16 // 2 + 2 * SCALE)


@pytest.mark.parametrize("training", [True, False])
def test_the_report_changes_nothing(training):
    def network() -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Conv2d(8, 8, 3),
            nn.Flatten(),
            nn.Linear(128, 4),
        )
        net[1].eval()  # a frozen one
        return fb.convert(net, "ibm2020-luq")

    x = torch.randn(4, 3, 8, 8)

    def train(reported: bool) -> list[Tensor]:
        net = network().train(training)
        net[1].eval()
        for _ in range(3):
            if reported:
                modes = [m.training for m in net.modules()]
                before = copy.deepcopy(net.state_dict())
                grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
                hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
                fb.memory_report(net, x)
                assert modes == [m.training for m in net.modules()]
                assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
                assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
                for p, grad in zip(net.parameters(), grads, strict=True):
                    assert (p.grad is None) == (grad is None) and (grad is None or torch.equal(p.grad, grad))
            net(x).square().sum().backward()
        return [p.grad for p in net.parameters()] + list(net.state_dict().values())

    for a, b in zip(train(False), train(True), strict=True):
        assert torch.equal(a, b)


def test_a_report_that_fails_changes_nothing_either():
    net = fb.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), "ibm2020").eval()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(fb.UserError, match="needs 4 elements"):
        fb.memory_report(net, (2, 5))
    assert not net.training and not net[0]._forward_hooks and not net[0]._forward_pre_hooks
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_checkpointing_recomputes_is_not_counted(reentrant):
    class Net(nn.Module):
        def __init__(self, checkpointed: bool):
            super().__init__()
            self.checkpointed = checkpointed
            self.body = nn.Sequential(fb.nn.Linear(64, 64, spec=TPR), nn.ReLU(), fb.nn.Linear(64, 64, spec=TPR))

        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            return checkpoint(self.body, x, use_reentrant=reentrant) if self.checkpointed else self.body(x)

    plain, saving = (fb.memory_report(Net(flag), (128, 64)) for flag in (False, True))
    assert [layer.saved_bytes for layer in saving.layers] == [0, 0]
    assert sum(saving.others.values()) == 4 * 128 * 64  # the input of what is recomputed
    assert all(layer.ratio > 0.1 for layer in plain.layers)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_is_kept_is_freed_by_the_backward_pass(checkpointed):
    net = nn.Sequential(fb.nn.Linear(64, 64, spec=TPR), nn.ReLU(), fb.nn.Conv1d(64, 64, 1, spec=LUQ))
    run = lambda x: net[2](net[1](net[0](x)).t().unsqueeze(0))  # noqa: E731
    alive: list[weakref.ref] = []

    def pack(t: Tensor) -> Tensor:
        if t.dtype == torch.uint8:
            alive.append(weakref.ref(t))
        return t

    x = torch.randn(32, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
    gc.collect()
    assert checkpointed or sum(ref() is not None for ref in alive) >= 5
    y.sum().backward()
    assert not [ref for ref in alive if ref() is not None]


def test_the_command_prints_layers_and_totals(capsys):
    assert main(["memory", "--model", "digits_cnn", "--input", "1x8x8", "--batch-size", "16"]) == 0
    printed = capsys.readouterr().out
    assert "4-bit layers: " in printed and "everything else: " in printed and "by the same network in FP32: " in printed
    assert main(["memory", "--batch-size", "0"]) == 2
    assert "batch_size is 0" in capsys.readouterr().err


def test_resnet20_reaches_the_target():
    net = fb.convert(fb.models.build("resnet20", num_classes=10), "ibm2020")
    report = fb.memory_report(net, (2, 3, 32, 32))
    chosen = [layer for layer in report.layers if layer.bits == 4]
    assert len(chosen) == 18 and all(layer.ratio <= 0.17 for layer in chosen) and report.ratio(4) <= 0.17
    assert all(layer.float_bytes == 2 * SCALE for layer in chosen)
    assert str(report).count("0.1") >= 18


def _fused_network() -> nn.Module:
    torch.manual_seed(0)
    net = fb.convert(fb.models.build("resnet20", num_classes=10), "ibm2020")
    net(torch.randn(4, 3, 16, 16)).sum().backward()  # from now on all scales are known
    return net


def test_fused_chains_keep_no_float_tensor_between_their_layers():
    net = _fused_network()
    if not any("fused" in who for who in fb.memory_report(net, (4, 3, 16, 16)).others):
        pytest.skip("no kernels for fused chains here")
    plain = fb.memory_report(fb.models.build("resnet20", num_classes=10), (64, 3, 16, 16))
    fused, unfused = (
        fb.memory_report(fb.convert(fb.models.build("resnet20", num_classes=10), "ibm2020", fuse=flag), (64, 3, 16, 16))
        for flag in (True, False)
    )
    assert fused.total < 0.4 * plain.total and plain.total < unfused.total < 1.2 * plain.total
    assert fused.ratio(4) <= unfused.ratio(4) <= 0.17


def _bytes_alive() -> int:
    gc.collect()
    return sum(dict(filter(None, (_bytes_of(t) for t in gc.get_objects() if type(t) is Tensor))).values())


def _bytes_of(t: Tensor) -> tuple[int, int] | None:
    try:
        return t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
    except RuntimeError:  # one that torch's tracing left in a cache: it has no memory
        return None


@pytest.mark.parametrize("backward", [True, False])
def test_steps_of_a_fused_network_leave_nothing_behind(backward):
    net, x = _fused_network(), torch.randn(4, 3, 16, 16)
    alive = []
    for _ in range(3):
        loss = net(x).sum()
        if backward:
            loss.backward()
        del loss
        net.zero_grad(set_to_none=True)
        alive.append(_bytes_alive())
    assert alive[0] == alive[1] == alive[2]


def test_between_forward_and_backward_a_fused_network_holds_what_it_has_saved_and_no_more():
    net, x = _fused_network(), torch.randn(4, 3, 16, 16)
    before = _bytes_alive()
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = net(x)
    parameters = sum(p.numel() * 4 for p in net.parameters())
    assert _bytes_alive() - before <= sum(saved.values()) + parameters and y.requires_grad


def test_compiled_layers_keep_codes_too():
    layer = fb.nn.Linear(128, 32, bias=False, spec=TPR)
    x = torch.randn(64, 128, requires_grad=True)
    layer(x).sum().backward()
    kept: list[Tensor] = []
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.detach()), lambda t: t):
        compiled(x)
    floats = [t for t in kept if t.is_floating_point() and t.untyped_storage().nbytes() > 4]
    assert all(t.data_ptr() == layer.weight.data_ptr() for t in floats)  # by reference


@pytest.mark.parametrize(
    ("model", "input", "message"),
    [
        (nn.Linear(4, 2), (-1, 4), r"the input is \(-1, 4\), but must be a batch, or the shape of one"),
        (nn.Linear(4, 2), (0, 4), "must be a batch, or the shape of one"),
        (nn.Linear(4, 2), (2.0, 4), "must be a batch, or the shape of one"),
        (nn.Linear(4, 2), (), "must be a batch, or the shape of one"),
        (nn.Linear(4, 2), "2x4", "the input is '2x4'"),
        (nn.Linear(4, 2), None, "the input is None"),
        (nn.Linear(4, 2), (2, 5), r"does not run on an input of shape \(2, 5\)"),
        (nn.Linear(4, 2), (10**13, 4), "cannot be made .*: take a smaller one"),
        ("resnet20", (2, 4), "the model is 'resnet20', but must be a torch.nn.Module"),
    ],
)
def test_bad_input_is_named(model, input, message):
    with pytest.raises(fb.UserError, match=message):
        fb.memory_report(model, input)


@pytest.mark.parametrize("input", [(0, 4), "2x4", (2, 5)])
def test_explain_names_bad_input_as_well(input):
    with pytest.raises(fb.UserError, match=r"the input is|does not run on an input"):
        fb.explain(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)), "ibm2020", input)


def test_a_batch_beyond_all_memory_is_one_line(capsys):
    assert main(["memory", "--batch-size", "1000000000"]) == 2
    assert capsys.readouterr().err.startswith("fourbit: a batch of shape (1000000000, 3, 32, 32) cannot be made")
