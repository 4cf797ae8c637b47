"""Folded batch normalization: the reader of each layout computes the numbers of the model in evaluation mode."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fourbit as fb
from fourbit.cli import main
from fourbit.errors import UserError
from fourbit.exports import export, load_packed, read_packed
from fourbit.exports._fold import find_folds
from fourbit.exports._weights import PackedWeight, evaluating, weight_of
from fourbit.models._resnet import BasicBlock, ResNet

ROWS = fb.Recipe("rows", (fb.Rule(fb.LayerSpec(w_fprop=fb.QuantSpec("int4_sym", fb.Amax(), "row"))),))
UNEVEN = fb.Recipe("uneven", (fb.Rule(fb.LayerSpec(w_fprop=fb.QuantSpec("int4", fb.FixedScale(0.05)))),))


def convolutions() -> nn.Module:
    """Grouped, and of one and two axes of pixels' worth of kernels."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 1),
        nn.BatchNorm2d(8, affine=False),
        nn.Flatten(),
        nn.Linear(288, 10),
    )


def perceptron() -> nn.Module:
    layers = [nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(32, 10))


NETWORKS = {
    "convolutions": convolutions,
    "perceptron": perceptron,
    "resnet": lambda: ResNet(BasicBlock, (1, 1), (8, 16), "B", 10, 1),
}


def shape_of(network: str) -> tuple[int, ...]:
    return (32,) if network == "perceptron" else (1, 8, 8)


def trained(network: str, recipe: str | fb.Recipe) -> nn.Module:
    """Two steps; then factors of every sign, and a channel that is switched off in each normalization."""
    torch.manual_seed(0)
    model = NETWORKS[network]()
    fb.convert(model, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(torch.randn(8, *shape_of(network))), torch.randint(0, 10, (8,)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine:
            with torch.no_grad():
                module.weight.copy_(torch.randn_like(module.weight)).view(-1)[0] = 0.0
                module.bias.copy_(torch.randn_like(module.bias))
    return model.eval()


def served(folder, x: torch.Tensor) -> np.ndarray:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()  # else a product with weights of many scales rounds its input to 8 bits
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    return session.run(None, {"input": x.numpy()})[0]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("recipe", ["int4-fwd", "int4-qat", ROWS], ids=str)
def test_onnxruntime_computes_the_numbers_of_the_model_without_a_normalization(tmp_path, network, recipe):
    """Up to roundings of float32: of the scales, and of sums in another order."""
    onnx = pytest.importorskip("onnx")
    model, shape = trained(network, recipe), shape_of(network)
    export(model, tmp_path / "served", to="onnx", input_shape=shape, fold_batch_norm=True)
    graph = onnx.load(tmp_path / "served/model.onnx").graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    x = torch.randn(64, *shape)
    with torch.no_grad():
        y = model(x).numpy()
    assert np.abs(served(tmp_path / "served", x) - y).max() <= 4e-6 * np.abs(y).max()


def test_what_is_left_out_with_16_bit_results_is_their_rounding(tmp_path):
    """One layer, and the bound that its result's rounding to 10 significant bits sets, number by number."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.BatchNorm2d(16))
    fb.convert(model, fb.Recipe("mine", (fb.Rule(fb.recipes.CATALOG["ibm2020"].rules[-1].spec),)))
    for _ in range(3):
        model(torch.randn(8, 4, 8, 8)).square().sum().backward()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(16))
    model.eval()
    assert model[0].spec.output is not None
    folder = export(model, tmp_path / "served", to="onnx", input_shape=(4, 8, 8), fold_batch_norm=True)
    x = torch.randn(32, 4, 8, 8)
    with torch.no_grad():
        product = model[0](x) - model[0].bias.view(-1, 1, 1)
        factor = (model[1].weight / (model[1].running_var + model[1].eps).sqrt()).view(-1, 1, 1)
        far = (torch.from_numpy(served(folder, x)) - model(x)).abs()
    assert (far <= (2.0**-10 * product * factor).abs() + 1e-6).all()
    assert far.max() > 1e-4  # the rounding is there in the model


@pytest.mark.parametrize("network", NETWORKS)
def test_packed_weights_load_into_the_network_without_its_normalizations(tmp_path, network):
    model = trained(network, ROWS)
    folder = export(model, tmp_path / "served", to="safetensors", input_shape=shape_of(network), fold_batch_norm=True)
    plain = load_packed(NETWORKS[network](), folder).eval()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in plain.modules())
    x = torch.randn(16, *shape_of(network))
    with torch.no_grad():
        y, z = model(x), plain(x)
    assert (y - z).abs().max() <= 4e-6 * y.abs().max()
    unfolded = read_packed(export(model, tmp_path / "plain", to="safetensors"))
    assert {key for key in unfolded if "running" in key} and not {
        key for key in read_packed(folder) if "running" in key
    }


def test_codes_keep_their_magnitudes_and_scales_are_those_of_rows():
    model = trained("perceptron", "int4-fwd")
    with evaluating(model):
        folds = find_folds(model, (32,))
        before = weight_of("3", model[3])
    assert isinstance(before, PackedWeight) and before.scales.numel() == 1
    after, factor = folds.of["3"].into_packed(before), folds.of["3"].factor
    assert after.scales.shape == (32, 1, 1) and (after.scales > 0).all()
    assert torch.equal(after.values, before.values * factor.sign().view(-1, 1, 1))
    assert (factor < 0).any() and (factor == 0).sum() == 1
    assert torch.allclose(after.numbers(), factor.view(-1, 1) * before.numbers(), rtol=2.0**-22, atol=0)


def test_torchao_multiplies_by_codes_and_scales_of_rows(tmp_path):
    """A linear layer of torch whose weight is torchao's tensor of int4 codes with a scale for each row."""
    torchao = pytest.importorskip("torchao.quantization")
    from safetensors.torch import load_file

    model = trained("perceptron", ROWS)
    folder = export(model, tmp_path / "served", to="safetensors", input_shape=(32,), fold_batch_norm=True)
    tensors = load_file(folder / "model.safetensors")
    data = tensors["3.weight_codes"]
    codes = torch.stack((data & 15, data >> 4), 2).flatten(1).to(torch.int8)
    codes = torch.where(codes > 7, codes - 16, codes)
    scale = (tensors["3.tensor_scale"] * tensors["3.weight_scale"]).view(-1, 1)
    layer = nn.Linear(64, 32)
    layer.weight = nn.Parameter(
        torchao.IntxUnpackedToInt8Tensor(
            codes, scale, torch.zeros_like(scale, dtype=torch.int8), torch.int4, (1, 64), torch.float32, None
        ),
        requires_grad=False,
    )
    layer.bias = nn.Parameter(tensors["3.bias"])
    x = torch.randn(16, 64)
    with torch.no_grad():
        y, z = model[4](model[3](x)), layer(x)
    assert (y - z).abs().max() <= 4e-6 * y.abs().max()


def test_gguf_has_the_factor_in_the_scale_of_each_block(tmp_path):
    gguf = pytest.importorskip("gguf")
    model = trained("perceptron", ROWS)
    with torch.no_grad():
        model[1].weight[5] = 1e-6
    with pytest.warns(UserWarning, match="1 would make scales of 0 .* beyond 6.1e-05 to 6.55e"):
        folder = export(model, tmp_path / "small", to="gguf", fold_batch_norm=True, input_shape=(32,))
    assert "1.running_mean" in {t.name for t in gguf.GGUFReader(folder / "model.gguf").tensors}
    with torch.no_grad():
        for norm in (model[1], model[4]):
            norm.weight.copy_(norm.weight.sign())
    reader = gguf.GGUFReader(
        export(model, tmp_path / "served", to="gguf", fold_batch_norm=True, input_shape=(32,)) / "model.gguf"
    )
    tensors = {t.name: t for t in reader.tensors}
    assert set(tensors) == {f"{layer}.{what}" for layer in (0, 3, 6) for what in ("weight", "bias")}
    with evaluating(model):
        fold = find_folds(model, (32,)).of["3"]
        exact = fold.into(weight_of("3", model[3]).numbers()).numpy()
    found = gguf.dequantize(tensors["3.weight"].data, tensors["3.weight"].tensor_type)
    assert (np.abs(found - exact) <= 2.0**-11 * np.abs(exact) * (1 + 1e-5)).all()
    assert np.array_equal(tensors["3.bias"].data, fold.bias.numpy())


class Twice(nn.Module):
    """Every way in which a normalization does not simply follow a layer; `kind` chooses."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8, track_running_stats=kind != "statistics")

    def forward(self, x):
        y = self.a(x)
        if self.kind == "consumer":
            return self.b(self.norm(y)) + y
        if self.kind == "function":
            return self.b(self.norm(torch.relu(y)))
        if self.kind == "layer twice":
            return self.b(self.a(self.norm(y)))
        if self.kind == "norm twice":
            return self.norm(self.b(self.norm(y)))
        if self.kind == "axis":
            return self.b(self.norm(self.a(x.unsqueeze(1).expand(-1, 8, -1))))
        return self.b(self.norm(y))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("consumer", "norm is not all that the result of a goes to"),
        ("function", "norm has neither a convolution nor a linear layer directly in front of it"),
        ("layer twice", "norm or a is used more than once"),
        ("norm twice", "norm or a is used more than once"),
        ("axis", "norm or a is used more than once"),
        ("statistics", "norm has no running statistics"),
        ("", ""),
    ],
)
def test_a_normalization_that_does_not_simply_follow_a_layer_stays_and_is_named(tmp_path, kind, words):
    model = Twice(kind)
    fb.convert(model, ROWS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = export(model, tmp_path / "served", to="safetensors", fold_batch_norm=True, input_shape=(8,))
    said = [str(w.message) for w in caught]
    assert len(said) == bool(words) and all(f"not folded: {words}" in text for text in said)
    assert words in (folder / "README.md").read_text().replace("`norm` stays: it", "norm")
    state = model.state_dict()
    if words:
        assert torch.equal(read_packed(folder)["norm.weight"], state["norm.weight"])
        load_packed(Twice(kind), folder)
    else:
        assert not [key for key in read_packed(folder) if key.startswith("norm")]


def test_features_on_another_axis_are_not_taken_for_those_of_the_layer(tmp_path):
    """BatchNorm1d behind a linear layer of sequences normalizes positions, of which there are as many here as features."""

    class Sequences(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x):
            return self.norm(self.a(x))

    model = Sequences()
    fb.convert(model, ROWS)
    with pytest.warns(UserWarning, match="norm may normalize another axis than the features of a"):
        export(model, tmp_path / "served", to="safetensors", input_shape=(8, 8), fold_batch_norm=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(model, tmp_path / "flat", to="safetensors", input_shape=(8,), fold_batch_norm=True)


class Rows(nn.Module):
    """Rows of images, before a normalization of features that is one of rows."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.l, self.n = kind, nn.Linear(8, 8), nn.BatchNorm1d(8)
        if kind == "alias":
            self.other = self.l

    def forward(self, x):
        if self.kind == "flatten":
            x = torch.flatten(x, end_dim=1)
        return self.n(self.l(x))


@pytest.mark.parametrize(("kind", "input_shape"), [("", None), ("", (8, 8)), ("flatten", (3, 8, 8)), ("alias", (8,))])
def test_what_may_be_something_else_is_not_folded(kind, input_shape):
    """Inputs of unknown axes, a flattening from the front, a layer that loading would find under another name."""
    folds = find_folds(fb.convert(Rows(kind), ROWS).eval(), input_shape)
    assert not folds.of and list(folds.left) == ["n"]


def test_a_number_without_an_opposite_and_scales_of_a_format_stay_unfolded(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 4), nn.BatchNorm1d(4))
    fb.convert(model, UNEVEN)
    with torch.no_grad():
        model[0].weight[0, 0] = -0.4  # code -8
        model[1].weight[1] = -1.0  # of a row that has no -8, which is folded
        model[0].weight[1].clamp_(-0.3, 0.3)
    folder = export(model, tmp_path / "folded", to="safetensors", fold_batch_norm=True, input_shape=(32,))
    assert "1.running_mean" not in read_packed(folder)
    with torch.no_grad():
        model[1].weight[0] = -1.0
    with pytest.warns(UserWarning, match="negative factor for -8 in 0, which has no opposite in int4"):
        export(model, tmp_path / "left", to="safetensors", fold_batch_norm=True, input_shape=(32,))
    blocks = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32))
    fb.convert(blocks, fb.Recipe("blocks", (fb.Rule(fb.recipes.CATALOG["mxfp4-qat"].rules[-1].spec),)))
    with pytest.warns(UserWarning, match="factors that the e8m0 scales of 0 cannot take"):
        export(blocks, tmp_path / "blocks", to="gguf", fold_batch_norm=True, input_shape=(32,))


def test_layouts_and_networks_that_cannot_are_refused(tmp_path):
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else x

    model = Looks()
    fb.convert(model, ROWS)
    with pytest.raises(UserError, match="folding batch normalization is for feed-forward networks"):
        export(model, tmp_path / "served", to="safetensors", fold_batch_norm=True)
    with pytest.raises(UserError, match="compressed-tensors cannot leave out modules"):
        export(model, tmp_path / "served", to="compressed-tensors", fold_batch_norm=True)
    assert not (tmp_path / "served").exists()
    other = export(trained("perceptron", ROWS), tmp_path / "other", to="safetensors", fold_batch_norm=True)
    with pytest.raises(UserError, match="of another model than Looks"):
        load_packed(Looks(), other)


def test_the_command_folds_and_measures_what_it_folded(tmp_path, capsys):
    words = ["train", "--model", "resnet20?width=4", "--data", "digits", "--recipe", "int4-fwd", "--max-steps", "4"]
    run = str(tmp_path / "run")
    assert main([*words, "--batch-size", "16", "--out", run, "--threads", "1", "--no-progress"]) == 0
    assert main(["export", run, "--fold-batch-norm"]) == 0
    assert "Folded into the weights and biases of" in (tmp_path / "run/export-onnx/README.md").read_text()
    capsys.readouterr()
    for to in ("onnx", "safetensors"):
        assert main(["evaluate", run, "--to", to, "--fold-batch-norm"]) == 0
        assert f"export ({to})" in capsys.readouterr().out
