"""ONNX: onnxruntime computes the numbers of the model in evaluation mode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fourbit as fb
from fourbit.errors import UserError
from fourbit.exports import export
from fourbit.exports._onnx import _rounded
from fourbit.exports._onnx_nodes import Graph
from fourbit.models._resnet import BasicBlock, ResNet

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 31), nn.Linear(31, 32), nn.ReLU(), nn.Linear(32, 10)
    )


NETWORKS = {
    "digits": lambda: fb.models.build("digits_cnn", num_classes=10, in_channels=1),
    "resnet": lambda: ResNet(BasicBlock, (1, 1), (8, 16), "A", 10, 1),
    "perceptron": perceptron,
    "mobilenet": lambda: fb.models.build("mobilenet_v2", num_classes=10, in_channels=1),
}


def trained(network: str, recipe: str | fb.Recipe) -> nn.Module:
    """Two steps."""
    torch.manual_seed(0)
    model = NETWORKS[network]()
    fb.convert(model, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        nn.functional.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.randint(0, 10, (8,))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def results(model: nn.Module, folder) -> tuple[np.ndarray, np.ndarray]:
    """Of the model in evaluation mode, and of the exported graph."""
    x = torch.randn(64, 1, 8, 8)
    with torch.no_grad():
        y = model.eval()(x).numpy()
    options = onnxruntime.SessionOptions()  # a product with weights in blocks would round its input to 8 bits (level 4)
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    return y, session.run(None, {"input": x.numpy()})[0]


@pytest.mark.parametrize(
    ("network", "recipe"),
    [
        ("digits", "ibm2020"),
        ("digits", "int4-fwd"),
        ("resnet", "ibm2020"),
        ("resnet", "int4-qat"),
        ("perceptron", "int4-fwd"),
        ("perceptron", "fourbit"),
        pytest.param("mobilenet", "ibm2020", marks=pytest.mark.slow),
        pytest.param("mobilenet", "int4-fwd", marks=pytest.mark.slow),
    ],
)
def test_the_runtime_computes_the_numbers_of_the_model(tmp_path, network, recipe):
    """Equal where every product is rounded to 16 bits. Else sums in float32, which both take in an order of their own, differ
    by about 1e-7 of the largest."""
    model = trained(network, recipe)
    export(model, tmp_path / "served", to="onnx", input_shape=(1, 8, 8), recipe=recipe)
    y, z = results(model, tmp_path / "served")
    if any(layer.spec.output is None for layer in fb.quantized_layers(model).values()):
        off = np.abs(y - z).max(1) > 2e-6 * np.abs(y).max()
        # In 53 layers one number of one picture lies so near a decision point that the two sums fall to its two sides.
        assert off.sum() <= (1 if network == "mobilenet" else 0)
    else:
        assert np.array_equal(y, z)


def test_scales_of_rows_and_blocks_are_those_of_dequantize_linear(tmp_path):
    """Of the weights of linear layers and convolutions alone; inputs stay in full precision."""
    for granularity in ("row", fb.Block(8), fb.Tile(4, 8)):
        spec = fb.LayerSpec(w_fprop=fb.QuantSpec("int4_sym", fb.Amax(), granularity))
        for network in ("digits", "perceptron"):
            model = trained(network, fb.Recipe("mine", (fb.Rule(spec),)))
            if network == "perceptron" and granularity != "row":
                continue  # 31 inputs are not whole blocks
            folder = export(model, tmp_path / f"{network} {granularity}", to="onnx", input_shape=(1, 8, 8))
            y, z = results(model, folder)
            assert np.abs(y - z).max() <= 2e-6 * np.abs(y).max()


def test_the_weights_are_int4_and_the_signs_of_inputs_decide_their_type(tmp_path):
    folder = export(trained("perceptron", "int4-fwd"), tmp_path / "served", to="onnx")
    graph = onnx.load(folder / "model.onnx").graph
    kinds = {t.name: t.data_type for t in graph.initializer}
    assert kinds["3.weight"] == kinds["4.weight"] == onnx.TensorProto.INT4
    assert kinds["1.weight"] == onnx.TensorProto.FLOAT
    assert kinds["3.input_zero_point"] == onnx.TensorProto.UINT4
    assert kinds["4.input_zero_point"] == onnx.TensorProto.INT4


def test_the_rounding_to_16_bits_is_that_of_the_format(tmp_path):
    """Ties included, and the largest numbers; not what would flush to zero, below 2^-31."""
    format = fb.formats.FP16_169
    bits = torch.arange(0x2000_0000, 0x4F80_0000, 0x1000 // 2, dtype=torch.int32)[::7]
    x = torch.cat([bits.view(torch.float32), torch.tensor([3e9, 1e20, -1e20, -3.0, 0.0])])
    graph = Graph()
    graph.output(_rounded(graph, graph.input(["n"]), format))
    made = onnx.helper.make_graph(graph.nodes, "g", graph.inputs, graph.outputs, graph.initializers)
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"input": x.numpy()})[0]
    kept = (x.abs() >= format.smallest) | (x == 0)
    assert torch.equal(torch.from_numpy(found)[kept], fb.round_to_format(x, format)[kept])


@pytest.mark.parametrize(
    ("model", "recipe", "words"),
    [
        (perceptron, "nvfp4", "integers of 4 bits. Recipes that can: int4-fwd, ibm2020"),
        (perceptron, "luq", "scale that follows from each batch"),
        (perceptron, "ibm2020-acc", "sums are rounded"),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1), nn.Linear(8, 8)), "int4-qat", "does not know Softmax"),
        (lambda: nn.LSTM(64, 64, num_layers=2), "nvfp4-qat", "integers of 4 bits"),
    ],
)
def test_what_onnx_cannot_say_is_refused_in_a_sentence(tmp_path, model, recipe, words):
    network = model()
    fb.convert(network, recipe)
    if recipe == "int4-qat":
        network(torch.randn(4, 8)).sum().backward()
    with pytest.raises(UserError, match=words):
        export(network, tmp_path / "served", to="onnx")
    assert not (tmp_path / "served").exists()


def test_an_untrained_model_and_a_folder_that_is_taken_are_refused(tmp_path):
    model = perceptron()
    with pytest.raises(UserError, match="convert it first"):
        export(model, tmp_path)
    fb.convert(model, "int4-fwd")
    with pytest.raises(UserError, match="train the model first"):
        export(model, tmp_path / "served")
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="is not empty"):
        export(trained("perceptron", "int4-fwd"), tmp_path)
    with pytest.raises(UserError, match="onnx, safetensors"):
        export(model, tmp_path, to="onix")
    assert (tmp_path / "mine.txt").exists() and model.training
