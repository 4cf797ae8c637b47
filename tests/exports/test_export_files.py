"""Packed codes and scales in files: read back, they are the numbers that the layers multiply."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fourbit as fb
from fourbit.errors import UserError
from fourbit.exports import export, read_packed


def network() -> nn.Module:
    """The last layer stays in high precision; 20 and 65 inputs are no whole blocks."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(64, 20, 3),
        nn.Conv2d(20, 65, 2, bias=False),
        nn.Flatten(),
        nn.Linear(65, 64),
        nn.Linear(64, 64),
        nn.Linear(64, 10),
    )


def converted(recipe: str) -> nn.Module:
    model = network()
    fb.convert(model, recipe)
    model(torch.randn(4, 64, 4, 4)).sum().backward()
    return model


def multiplied(layer: nn.Module) -> torch.Tensor:
    """The weight that the layer multiplies, seen through its products with unit vectors and with images of one bright pixel."""
    layer = copy.deepcopy(layer).eval()
    layer.bias, layer.quant.spec = None, fb.LayerSpec(w_fprop=layer.spec.w_fprop)
    with torch.no_grad():
        if isinstance(layer, nn.Linear):
            return layer(torch.eye(layer.in_features)).t()
        size = layer.kernel_size[0]
        x = torch.zeros(layer.in_channels, layer.in_channels, 2 * size - 1, 2 * size - 1)
        x[:, :, size - 1, size - 1] = torch.eye(layer.in_channels)
        return layer(x).transpose(0, 1).flip(2, 3)


RECIPES = (
    "ibm2020",
    "int4-qat",
    "nvfp4-qat",
    "nvfp4",
    "nvfp4-4over6",
    "mxfp4",
    "fp4-forward",
    "e2m1-block64-e4m3",
    "hif4",
)
HIF4 = fb.Recipe("hif4", (fb.Rule(fb.LayerSpec(w_fprop=fb.recipes.catalog.blocks.HIF4)),))


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_read_back_is_what_the_layers_multiply(tmp_path, recipe):
    model = converted(HIF4 if recipe == "hif4" else recipe)
    found = read_packed(export(model, tmp_path / "served", to="safetensors"))
    assert found.keys() == fb.float_state_dict(model).keys()
    for name, layer in fb.quantized_layers(model).items():
        assert torch.equal(found[f"{name}.weight"], multiplied(layer)), name
        if layer.bias is not None:
            assert torch.equal(found[f"{name}.bias"], layer.bias)


@pytest.mark.parametrize("recipe", ["ibm2020", "nvfp4-qat", "fp4-forward"])
def test_the_numpy_of_the_documentation_reads_the_same(tmp_path, monkeypatch, recipe):
    page = (Path(__file__).parents[2] / "docs/export.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "numpy" in block)
    folder = export(converted(recipe), tmp_path / "served", to="safetensors")
    monkeypatch.chdir(folder)
    space: dict = {}
    exec(code, space)
    for name, t in read_packed(folder).items():
        assert torch.equal(torch.from_numpy(space["tensors"][name].copy()), t)


def test_the_restored_model_takes_the_weights(tmp_path):
    model = converted("nvfp4-qat")
    folder = export(model, tmp_path / "served", to="safetensors")
    assert "nvfp4" in (folder / "README.md").read_text() or "fp4_e2m1" in (folder / "README.md").read_text()
    served = network()
    served.load_state_dict(read_packed(folder))
    x = torch.randn(2, 64, 4, 4)
    assert torch.isfinite(served(x)).all()
    assert (folder / "model.safetensors").stat().st_size < 0.2 * sum(4 * p.numel() for p in model.parameters()) + 4000


@pytest.mark.parametrize(
    ("recipe", "words"), [("quartet", "rotated"), ("mxfp4-ceil-sr", "stochastic"), ("fp32", "convert it first")]
)
def test_what_no_file_can_hold_is_refused(tmp_path, recipe, words):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    fb.convert(model, recipe)
    with pytest.raises(UserError, match=words):
        export(model, tmp_path / "served", to="safetensors")


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="does not say how"):
        read_packed(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read"):
        read_packed(tmp_path)


def test_a_header_that_does_not_fit_its_tensors_is_one_sentence(tmp_path):
    from safetensors.torch import save_file

    for header in (
        "{",
        "[]",
        '{"formats": {}, "layers": {"x": {"shape": [2, 2]}}}',
        '{"formats": {}, "layers": {"x": 1}}',
    ):
        save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"fourbit": header})
        with pytest.raises(UserError, match="does not fit its tensors"):
            read_packed(tmp_path)
