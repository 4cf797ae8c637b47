"""Layouts of language models: compressed-tensors loaded by transformers, GGUF by the gguf package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fourbit as fb
from fourbit.cli import main
from fourbit.errors import UserError
from fourbit.exports import export
from fourbit.exports._weights import PackedWeight, weight_of

pytest.importorskip("compressed_tensors")
gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

from fourbit.integrations.transformers import convert, save_pretrained  # noqa: E402

HEAD = fb.Rule(None, where=fb.last(1))
INT4_ROWS = fb.LayerSpec(w_fprop=fb.QuantSpec("int4", fb.Amax(), "row"))
INT4_GROUPS = fb.LayerSpec(w_fprop=fb.QuantSpec("int4_sym", fb.Amax(), fb.Block(32)))
ROWS, GROUPS = fb.Recipe("rows", (HEAD, fb.Rule(INT4_ROWS))), fb.Recipe("groups", (HEAD, fb.Rule(INT4_GROUPS)))


@pytest.fixture(autouse=True)
def quiet():
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


def llama(recipe: str | fb.Recipe, folder=None, **changes) -> nn.Module:
    """Converted and run once; with `folder`, saved there and loaded again as FourBitTrainer's models are."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model(
        "llama", vocab_size=32, num_key_value_heads=2, max_position_embeddings=32, **(sizes | changes)
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    if isinstance(recipe, str):
        convert(model, recipe)
    else:
        fb.convert(model, recipe)
    ids = torch.randint(0, 32, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    if folder is None:
        return model
    save_pretrained(model, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def weights(model: nn.Module) -> dict[str, PackedWeight | torch.Tensor]:
    model.eval()
    return {name: weight_of(name, m) for name, m in fb.quantized_layers(model).items() if not m.spec.is_identity}


SLOW = [pytest.param(recipe, marks=pytest.mark.slow) for recipe in ("nvfp4-4over6", "mxfp4", ROWS, GROUPS)]


@pytest.mark.parametrize("recipe", ["ibm2020", "nvfp4", *SLOW], ids=str)
def test_transformers_loads_the_weights_that_the_layers_multiply(tmp_path, recipe):
    """INT4 and MXFP4 exactly. NVFP4 within 2^-8, because compressed-tensors unpacks it to bfloat16; with float32 scales of
    groups, where the scale of the tensor is multiplied first, within 2^-22."""
    model = llama(recipe, tmp_path / "saved" if recipe == "ibm2020" else None)
    folder = export(model, tmp_path / "served", to="compressed-tensors")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, 32, (2, 8))
    with torch.no_grad():
        logits = loaded(input_ids=ids).logits  # the first pass unpacks
    reference = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("llama", **plain(model))
    )
    state = fb.float_state_dict(model)
    wide = isinstance(recipe, str) and "fp4" in recipe
    for name, weight in weights(model).items():
        assert isinstance(weight, PackedWeight) or name == "lm_head" or recipe == "ibm2020"
        exact = weight.numbers() if isinstance(weight, PackedWeight) else weight
        found = loaded.get_submodule(name).weight.detach().float()
        tolerance = {"nvfp4": 2.0**-8, "nvfp4-4over6": 2.0**-8, "groups": 2.0**-22}.get(
            str(getattr(recipe, "name", recipe)), 0.0
        )
        assert ((found - exact).abs() <= tolerance * exact.abs()).all(), name
        state[f"{name}.weight"] = found
    reference.load_state_dict(state)
    with torch.no_grad():
        wanted = reference.eval()(input_ids=ids).logits
    assert loaded.dtype == (torch.bfloat16 if wide else torch.float32)
    assert (logits - wanted).abs().max() <= (2.0**-6 if wide else 1e-6) * wanted.abs().max()  # sums of another order


@pytest.mark.slow
def test_the_command_exports_a_saved_folder(tmp_path, capsys):
    llama("ibm2020", tmp_path / "saved")
    assert main(["export", str(tmp_path / "saved"), "--to", "compressed-tensors"]) == 0
    assert "recipe `ibm2020`" in (tmp_path / "saved/export-compressed-tensors/README.md").read_text()
    assert main(["evaluate", str(tmp_path / "saved")]) == 2
    assert "there is no run in" in capsys.readouterr().err


def plain(model: nn.Module) -> dict:
    config = model.config.to_dict()
    return {key: value for key, value in config.items() if key not in ("quantization_config", "model_type")}


@pytest.mark.slow
def test_nvfp4_scales_and_codes_are_ours(tmp_path):
    from safetensors.torch import load_file

    model = llama("nvfp4-qat")
    stored = load_file(export(model, tmp_path / "served", to="compressed-tensors") / "model.safetensors")
    for name, weight in weights(model).items():
        assert torch.equal(stored[f"{name}.weight_scale"].float(), weight.scales[:, 0].expand(weight.shape[0], -1))
        packed = stored[f"{name}.weight_packed"]
        assert torch.equal(torch.stack((packed & 15, packed >> 4), 2).flatten(1), weight.codes[:, 0])
        assert torch.allclose(1 / stored[f"{name}.weight_global_scale"], weight.tensor_scale, rtol=2e-7)


@pytest.mark.parametrize("recipe", ["ibm2020", *SLOW[1:]], ids=str)
def test_gguf_dequantizes_to_the_weights_that_the_layers_multiply(tmp_path, recipe):
    """MXFP4 exactly; Q4_0 with the scale rounded to fp16, within 2^-11."""
    model = llama(recipe)
    reader = gguf.GGUFReader(export(model, tmp_path / "served", to="gguf") / "model.gguf")
    tensors = {t.name: t for t in reader.tensors}
    assert tensors.keys() == fb.float_state_dict(model).keys()
    for name, weight in weights(model).items():
        t = tensors[f"{name}.weight"]
        found = gguf.dequantize(t.data, t.tensor_type)
        exact = (weight.numbers() if isinstance(weight, PackedWeight) else weight).numpy()
        if t.tensor_type == gguf.GGMLQuantizationType.Q4_0:
            assert (np.abs(found - exact) <= 2.0**-11 * np.abs(exact)).all()
        else:
            assert np.array_equal(found, exact)
            assert recipe != "mxfp4" or t.tensor_type == gguf.GGMLQuantizationType.MXFP4


@pytest.mark.parametrize(
    ("to", "make", "words"),
    [
        ("compressed-tensors", lambda: llama("fp4-forward"), "INT4, NVFP4 and MXFP4. Recipes that can: int4-fwd"),
        ("compressed-tensors", lambda: llama("nvfp4-qat", intermediate_size=72), "not whole blocks of 16"),
        ("gguf", lambda: llama("nvfp4-qat"), r"Q4_0\) and MXFP4"),
        ("gguf", lambda: llama("mxfp4-qat", intermediate_size=72), "not whole blocks of 32"),
        ("gguf", lambda: convolutions(), "for linear layers"),
        ("compressed-tensors", lambda: convolutions(), "folder of transformers"),
    ],
)
def test_what_they_cannot_hold_is_refused_in_a_sentence(tmp_path, to, make, words):
    with pytest.raises(UserError, match=words):
        export(make(), tmp_path / "served", to=to)
    assert not (tmp_path / "served").exists()


def convolutions() -> nn.Module:
    model = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(3)))
    fb.convert(model, "int4-fwd")
    model(torch.randn(1, 4, 2, 2)).sum().backward()
    return model


def test_scales_that_fp16_cannot_hold_are_refused(tmp_path):
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
    fb.convert(model, "int4-fwd")
    with torch.no_grad():
        model[1].weight.mul_(1e-5)
    model(torch.randn(2, 32)).sum().backward()
    with pytest.raises(UserError, match="beyond the normal numbers of fp16"):
        export(model, tmp_path / "served", to="gguf")
