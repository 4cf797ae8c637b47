"""Experts of transformers' mixtures: without quantization the class's own numbers; with it, a linear layer's per expert."""

from __future__ import annotations

import copy
import importlib
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fourbit as fb
from fourbit.errors import UserError
from fourbit.ops import LayerSpec
from fourbit.quantizers import QTensor, QuantSpec, Rounding, Sawb, quantize
from fourbit.recipes import catalog

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("transformers.integrations.moe", reason="this transformers has no experts with three axes")

COUNT, WIDTH, INNER, CHOSEN = 5, 8, 6, 2

ACTIVATIONS = dict.fromkeys(("hidden_act", "mlp_hidden_act", "hidden_activation"), "silu")
NAMES_OF_COUNT = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CONFIG = SimpleNamespace(
    **dict.fromkeys(NAMES_OF_COUNT, COUNT),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), INNER),
    **ACTIVATIONS,
    moe_latent_size=None,
    post_norm_eps=1e-6,
    swiglu_alpha=1.7,
    swiglu_limit=1.0,
    _experts_implementation="eager",
)

CLASSES = {
    "gated": ("mixtral", "MixtralExperts"),
    "gated, transposed": ("aria", "AriaExperts"),
    "clamped gate, transposed, biases": ("gpt_oss", "GptOssExperts"),
    "no gate": ("nemotron_h", "NemotronHExperts"),
    "norm behind": ("muse_spark", "MuseSparkExperts"),
}


def make(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """The experts of a model of transformers, with random weights."""
    folder, name = CLASSES[kind]
    try:
        cls = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), name)
    except ImportError:
        pytest.skip(f"this transformers has no {folder}")
    experts = cls(CONFIG)
    with torch.no_grad():
        for p in experts.parameters():
            p.copy_(torch.randn_like(p) / 2)
    return experts.to(dtype)


def batch(num_rows: int = 7, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, the experts of each, and their weights; the last expert gets none."""
    x = torch.randn(num_rows, WIDTH, dtype=dtype).requires_grad_()
    index = torch.rand(num_rows, COUNT - 1).argsort(1)[:, :CHOSEN]
    return x, index, torch.rand(num_rows, CHOSEN, dtype=dtype).requires_grad_()


def gradients(y: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y.sin().sum(), of, materialize_grads=True, allow_unused=True)


def recipe(spec: LayerSpec) -> fb.Recipe:
    return fb.Recipe("x", (fb.Rule(spec),))


def converted(experts: nn.Module, spec: LayerSpec) -> Any:
    return fb.convert(nn.Sequential(experts), recipe(spec))[0]


@pytest.mark.parametrize("kind", CLASSES)
def test_without_quantization_every_number_is_the_classes_own(kind):
    torch.manual_seed(0)
    experts = make(kind, torch.float64)
    x, index, weights = batch(dtype=torch.float64)
    leaves = x, weights, *experts.parameters()
    y = experts(x, index, weights)
    found = [(y, *gradients(y, *leaves))]
    fb.nn.learn_class(type(experts))
    experts.__class__ = fb.nn.SWAPS[type(experts)]
    for name in experts.parts():
        experts.attach(name, LayerSpec())
    assert torch.equal(experts(x, index, weights), y)
    y = experts._mix(x, index, weights)
    found.append((y, *gradients(y, *leaves)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


class Separate(nn.Module):
    """The same mixture, out of two of our linear layers for each expert."""

    def __init__(self, experts: Any):
        super().__init__()
        self._gate = experts._apply_gate if experts.has_gate else experts.act_fn
        self._norm = experts.post_expert_norm if experts.has_post_expert_norm else nn.Identity()
        up, down = experts.parts()
        self.up, self.down = (self._layers(experts, name) for name in (up, down))

    def _layers(self, experts: Any, name: str) -> nn.ModuleList:
        layers, part = nn.ModuleList(), experts.part(name)
        for e, w in enumerate(experts.part_weight(name)):
            layer = fb.nn.Linear(w.shape[1], w.shape[0], bias=experts.has_bias, spec=part.spec)
            layer.weight = nn.Parameter(w.detach().clone())
            if experts.has_bias:
                layer.bias = nn.Parameter(getattr(experts, f"{name}_proj_bias")[e].detach().clone())
            layer.quant.load_state_dict(part.quant.state_dict())
            layers.append(layer)
        return layers

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            row, position = torch.where(index == e)
            if len(row):
                out = self._norm(down(self._gate(up(x[row]))))
                y = y.index_add(0, row, out * weights[row, position, None])
        return y


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", ["TPR", "FP16", "INT4_FORWARD"])
def test_with_quantization_every_number_is_that_of_a_linear_layer_per_expert(kind, name):
    torch.manual_seed(0)
    spec = getattr(catalog, name)
    experts = converted(make(kind), spec)
    x, index, weights = batch(40)
    gradients(experts(x, index, weights), x)  # the first batch decides clip values and exponents
    separate = Separate(experts)
    y = experts(x, index, weights)
    expected = separate(x, index, weights)
    torch.testing.assert_close(y, expected)
    up, down = experts.parts()
    own = [getattr(experts, f"{n}_proj") for n in (up, down)]
    ours = gradients(y, x, weights, *own)
    layers = [[*separate.up], [*separate.down]]
    theirs = gradients(expected, x, weights, *(layer.weight for group in layers for layer in group))
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a, b)
    for i, dw in enumerate(ours[2:]):
        dw = dw.transpose(1, 2) if experts.is_transposed else dw
        torch.testing.assert_close(dw, torch.stack(theirs[2 + i * COUNT :][:COUNT]))
        assert not dw[-1].any() and dw[:-1].any()  # no row went to the last one


def test_the_clip_values_get_the_sum_of_the_gradients_of_all_experts():
    torch.manual_seed(0)
    experts = converted(make("gated"), catalog.TPR)
    x, index, weights = batch(40)
    gradients(experts(x, index, weights), x)
    separate = Separate(experts)
    for model in (experts, separate):
        model(x, index, weights).sin().sum().backward()
    for name, layers in (("gate_up", separate.up), ("down", separate.down)):
        alphas = [layer.quant.x_alpha.grad for layer in layers]
        assert len([a for a in alphas if a is not None]) == COUNT - 1
        total = torch.stack([a for a in alphas if a is not None]).sum(0)
        torch.testing.assert_close(experts.part(name).quant.x_alpha.grad, total)


def test_every_expert_has_a_scale_of_its_own():
    torch.manual_seed(0)
    experts = make("gated")
    with torch.no_grad():
        experts.down_proj[0] /= 1000
    spec = LayerSpec(w_fprop=QuantSpec("int4_sym", Sawb()))
    experts = converted(experts, spec)
    x = torch.randn(9, WIDTH)
    y = experts(x, torch.zeros(9, 1, dtype=torch.int64), torch.ones(9, 1))
    gate_up, down = (quantize(w[0], spec.w_fprop).dequantize() for w in (experts.gate_up_proj, experts.down_proj))
    gate, up = (x @ gate_up.t()).chunk(2, -1)
    assert y.any()
    torch.testing.assert_close(y, (torch.nn.functional.silu(gate) * up) @ down.t())


def test_the_first_batch_decides_for_all_experts_and_not_the_first_one_alone():
    torch.manual_seed(0)
    experts = converted(make("gated"), catalog.TPR)
    x, index, weights = batch(40)
    with torch.no_grad():
        x[index[:, 0] == 3] *= 20
        weights[index[:, 0] != 3] /= 100
    experts(x, index, weights).square().sum().backward()
    part, plain = experts.part("gate_up").quant, fb.nn.Linear(WIDTH, 2 * INNER, spec=catalog.TPR)
    plain(x.detach()[torch.arange(40).repeat_interleave(CHOSEN)])
    assert 0.8 < float(part.x_alpha.detach() / plain.quant.x_alpha.detach()) < 1.25
    for name in experts.parts():
        assert 32 < float(experts.part(name).quant.g_amax) <= 64


def test_no_rows_and_rows_of_nobody_here():
    experts = converted(make("gated"), catalog.TPR)
    x, index, weights = batch(0)
    y = experts(x, index, weights)
    y.sum().backward()
    assert y.shape == (0, WIDTH) and not experts.down_proj.grad.any()
    x, index, weights = batch(6)
    index[:3] = COUNT  # experts of another process
    y = experts(x, index, weights)
    assert not y[:3].any() and y[3:].any()
    y.sum().backward()
    assert not x.grad[:3].any() and not weights.grad[:3].any() and x.grad[3:].any()


def test_arguments_by_name_and_of_wrong_shapes():
    torch.manual_seed(0)
    x, index, weights = batch()
    for kind, names in (("gated", ("top_k_index", "top_k_weights")), ("no gate", ("top_k_index", "top_k_weights"))):
        experts = converted(make(kind), catalog.TPR)
        y = experts(x, index, weights)
        assert torch.equal(experts(hidden_states=x, **dict(zip(names, (index, weights), strict=True))), y)
    oss = converted(make("clamped gate, transposed, biases"), catalog.TPR)
    assert torch.equal(oss(x, routing_weights=weights, router_indices=index), oss(x, index, weights))
    with pytest.raises(
        UserError, match=r"experts and weights of shapes \(7, 2\) and \(7, 5\) for 7 rows: it needs one"
    ):
        oss(x, index, torch.rand(7, COUNT))
    with pytest.raises(UserError, match="got an input of shape"):
        oss(x[:, 1:], index, weights)


def test_autocast_gives_the_dtype_of_the_input_as_the_class_does():
    experts = make("gated")
    x, index, weights = batch()
    with torch.autocast("cpu", torch.bfloat16):
        before = experts(x, index, weights)
        after = converted(experts, catalog.TPR)(x, index, weights)
    assert after.dtype == before.dtype
    half = converted(make("gated", torch.bfloat16), catalog.TPR)
    y = half(x.bfloat16(), index, weights)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and half.down_proj.grad.dtype == torch.bfloat16


def test_one_of_the_two_products_can_stay_in_full_precision():
    torch.manual_seed(0)
    only_down = fb.Recipe("x", (fb.Rule(None, where=fb.name("gate_up")), fb.Rule(catalog.INT4_FORWARD)))
    experts = fb.convert(nn.Sequential(make("gated")), only_down)[0]
    assert experts.part("gate_up").spec.is_identity and experts.part("down").spec == catalog.INT4_FORWARD
    x, index, weights = batch(40)
    y = experts(x, index, weights)
    torch.testing.assert_close(y, Separate(experts)(x, index, weights))


def test_stochastic_rounding_draws_other_words_for_each_expert_and_step():
    torch.manual_seed(0)
    rounded = QuantSpec("int4_sym", Sawb(), rounding=Rounding.STOCHASTIC)
    experts = make("no gate")
    with torch.no_grad():
        experts.up_proj[1] = experts.up_proj[0]
    experts = converted(experts, LayerSpec(w_fprop=rounded))
    seen: list[Tensor] = []

    class Note:
        def record(self, slot: str, x: Tensor, quantized: QTensor) -> None:
            if slot == "w_fprop":
                seen.append(quantized.dequantize())

    experts.part("up").quant.observer = Note()
    for _ in range(2):
        y = experts(torch.randn(4, WIDTH).requires_grad_(), torch.tensor([[0], [0], [1], [1]]), torch.ones(4, 1))
        y.sum().backward()
    first, second, later, _ = seen
    assert not torch.equal(first, second) and not torch.equal(first, later)


@pytest.mark.parametrize("kind", ["gated", "clamped gate, transposed, biases"])
def test_restore_copies_and_pickles(kind):
    torch.manual_seed(0)
    plain = make(kind)
    model = nn.Sequential(copy.deepcopy(plain))
    arguments = batch()
    fb.convert(model, recipe(catalog.TPR))
    y = model[0](*arguments)
    assert isinstance(model[0], type(plain)) and set(plain.state_dict()) < set(model[0].state_dict())
    assert set(fb.float_state_dict(model)) == {f"0.{key}" for key in plain.state_dict()}
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(other[0]) is type(model[0]) and torch.equal(other[0](*arguments), y)
    fb.restore(model)
    assert type(model[0]) is type(plain) and list(model[0].state_dict()) == list(plain.state_dict())
    assert vars(model[0]).keys() == vars(plain).keys()
    assert torch.equal(model[0](*arguments), plain(*arguments))


def small(name: str, **options: Any) -> Any:
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 32}
    config = transformers.AutoConfig.for_model(name, **sizes | options)
    return transformers.AutoModelForCausalLM.from_config(config)


MODELS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize(
    "name", ["mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_moe", "gpt_oss"))]
)
def test_explain_counts_the_rows_that_each_expert_gets(name):
    model = small(name, **MODELS[name])
    tokens = torch.randint(32, (2, 8))
    for found in (fb.explain(model, "ibm2020", tokens), fb.explain(fb.convert(model, "ibm2020"), "ibm2020", tokens)):
        layers = {layer.name: layer for layer in found.layers if ".experts." in layer.name}
        assert len(layers) == 4
        for key, layer in layers.items():
            outputs, inputs = (96, 32) if key.endswith("gate_up") else (32, 48)
            assert layer.num_macs == dict.fromkeys(("fprop", "dgrad", "wgrad"), 2 * 8 * 2 * outputs * inputs)
            assert layer.rule == "4-bit"


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_of_transformers_hold_the_float_weights_in_their_form(name, tmp_path):
    torch.manual_seed(0)
    model = small(name, **MODELS[name])
    tokens = torch.randint(32, (2, 8))
    fb.convert(model, "ibm2020")
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.save_pretrained(tmp_path, state_dict=fb.float_state_dict(model))
    fb.restore(model)
    model.save_pretrained(tmp_path / "plain")
    for folder in (tmp_path, tmp_path / "plain"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert list(loaded.state_dict()) == list(model.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_memory_report_has_both_products():
    model = fb.convert(small("mixtral", **MODELS["mixtral"]), "ibm2020")
    report = fb.memory_report(model, torch.randint(32, (4, 16)))
    layers = {layer.name: layer for layer in report.layers if ".experts." in layer.name}
    assert len(layers) == 4
    assert all(layer.bits == 4 and 0.1 < layer.ratio < 0.2 for layer in layers.values())


def test_gradient_checkpointing_replays_the_same_numbers():
    grads = []
    for again in (False, True):
        torch.manual_seed(0)
        model = fb.convert(small("mixtral", **MODELS["mixtral"]), "luq").train()
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        tokens = torch.randint(32, (2, 8))
        for _ in range(2):
            model.zero_grad()
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


class Grouped(nn.Module):
    """A layer of somebody else's, with a matrix for each group."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (x.view(-1, 2, 1, 4) @ self.weight).flatten(1)


def test_other_stacks_of_matrices_are_named_and_stay_in_full_precision():
    from torch.nn.utils.parametrizations import weight_norm

    model = nn.Sequential(nn.Linear(8, 8), Grouped(), nn.Linear(8, 8))
    found = {matrix.name: matrix for matrix in fb.explain(model, recipe(catalog.TPR)).matrices}
    assert found["1.weight"].reason == "parameter of Grouped, not of a layer" and not found["0.weight"].reason
    fb.convert(model, recipe(catalog.TPR))
    assert type(model[1]) is Grouped
    normed = nn.Sequential(nn.Conv1d(8, 8, 3), weight_norm(nn.Conv1d(8, 8, 3)))
    assert "ParametrizationList" not in str(fb.explain(normed, recipe(catalog.TPR)))


def test_experts_that_are_not_what_their_class_says_are_named():
    experts = make("gated")
    experts.down_proj = nn.Parameter(experts.down_proj[0])
    found = fb.explain(nn.Sequential(nn.Linear(4, 4), experts), recipe(catalog.TPR)).layers
    assert found[1].note == "MixtralExperts cannot be converted, stays in full precision"
