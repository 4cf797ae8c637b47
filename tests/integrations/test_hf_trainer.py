"""transformers' Trainer: converts, groups clip values, logs layers, resumes to the bit, and its folders load converted."""

from __future__ import annotations

import json
import os

import pytest
import torch

transformers = pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, TrainingArguments  # noqa: E402

import fourbit as fb  # noqa: E402
from fourbit.errors import UserError  # noqa: E402
from fourbit.integrations.transformers import FourBitMixin, FourBitTrainer, convert, load_state, save_pretrained  # noqa: E402


@pytest.fixture(autouse=True)
def quiet():
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


def gpt2():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt2", vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return AutoModelForCausalLM.from_config(config)


def vit():
    """Its modules have other names in files than in memory."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = AutoConfig.for_model("vit", image_size=16, patch_size=8, num_labels=5, **sizes)
    return AutoModelForImageClassification.from_config(config)


def tokens():
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 64, (16,), generator=generator) for _ in range(32)]
    return [{"input_ids": row, "labels": row} for row in rows]


def pictures():
    generator = torch.Generator().manual_seed(1)
    return [
        {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": torch.tensor(i % 5)} for i in range(32)
    ]


KINDS = {
    "gpt2": (gpt2, tokens, AutoModelForCausalLM),
    "vit": (vit, pictures, AutoModelForImageClassification),
}


def arguments(folder, **changes):
    base = {"output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 2}
    base |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_steps": 2, "gradient_accumulation_steps": 2}
    base |= {"learning_rate": 1e-3, "seed": 0, "dataloader_pin_memory": False, "weight_decay": 0.1}
    return TrainingArguments(**{**base, **changes})


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("gpt2", "ibm2020"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("vit", "ibm2020"), ("gpt2", "luq"), ("vit", "nvfp4"))
        ),
    ],
)
def test_a_resumed_run_and_a_loaded_folder_equal_the_whole_run_to_the_bit(tmp_path, kind, recipe):
    make, rows, auto = KINDS[kind]
    whole = FourBitTrainer(make(), arguments(tmp_path), train_dataset=rows(), recipe=recipe)
    whole.train()
    state = {name: t.clone() for name, t in whole.model.state_dict().items()}
    loaded = auto.from_pretrained(tmp_path / "checkpoint-4")
    assert {name: torch.equal(t, state[name]) for name, t in loaded.state_dict().items()} == dict.fromkeys(state, True)
    batch = {name: torch.stack([row[name] for row in rows()[:4]]) for name in rows()[0]}
    assert torch.equal(whole.model.eval()(**batch).logits, loaded.eval()(**batch).logits)
    again = FourBitTrainer(make(), arguments(tmp_path), train_dataset=rows(), recipe=recipe)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [name for name, t in again.model.state_dict().items() if not torch.equal(t, state[name])] == []
    config = json.loads((tmp_path / "checkpoint-4" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["recipe"]) == ("fourbit", recipe)


def test_the_choice_of_layers_is_kept_and_a_checkpoint_of_another_is_refused(tmp_path):
    def trainer(recipe="mxfp4", seed=0, **choice):  # layers of mxfp4 remember nothing
        return FourBitTrainer(
            gpt2(), arguments(tmp_path), train_dataset=tokens(), recipe=recipe, seed=seed, **choice
        )  # fmt: skip

    whole = trainer(skip=lambda name, layer: "attn" in name, only="h.1")
    whole.train()
    layers = set(fb.quantized_layers(whole.model))
    assert layers == {"transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert set(fb.quantized_layers(loaded)) == layers
    rows = torch.stack([row["input_ids"] for row in tokens()[:2]])
    assert torch.equal(whole.model.eval()(rows).logits, loaded.eval()(rows).logits)
    again = trainer(skip=lambda name, layer: "attn" in name, only="h.1")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(t, whole.model.state_dict()[name]) for name, t in again.model.state_dict().items())
    goes_on = FourBitTrainer(loaded, arguments(tmp_path), train_dataset=tokens())
    goes_on._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    for other, setting in (
        (trainer(), "only='h.1', not with only=None"),
        (trainer(only="h.1"), "not with skip=None"),
        (trainer("nvfp4"), "recipe='mxfp4', not with recipe='nvfp4'"),
        (trainer(seed=1), "seed=0, not with seed=1"),
    ):
        with pytest.raises(UserError, match=setting):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(UserError, match="only and skip choose layers for a recipe"):
        FourBitTrainer(gpt2(), arguments(tmp_path), train_dataset=tokens(), only="h.1")
    with pytest.raises(UserError, match="only 'nothing' chooses no layer"):
        trainer(only="nothing")


def test_a_folder_with_a_damaged_or_malicious_configuration_is_refused_and_runs_no_code(tmp_path):
    folder = tmp_path / "model"
    save_pretrained(convert(gpt2(), "luq"), folder)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    good = dict(config["quantization_config"])
    for change, words in (
        ({"recipe": f"{folder / 'code.py'}:make"}, "unknown recipe"),
        ({"recipe": {"a": 1}}, "must be a name"),
        ({"seed": "x"}, "must be a whole number"),
        ({"only": "("}, "not a regular expression"),
        ({"skip": [1]}, "must be a regular expression"),
        ({"products": "other"}, "products must be"),
    ):
        config["quantization_config"] = good | change
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=words):
            AutoModelForCausalLM.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_clip_values_have_a_group_and_layers_are_logged(tmp_path):
    heard: list[dict] = []

    class Listener(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            heard.append(logs)

    changes = {"max_steps": 2, "save_strategy": "no"}
    trainer = FourBitTrainer(
        gpt2(), arguments(tmp_path, **changes), train_dataset=tokens(), recipe="ibm2020", alpha_weight_decay=0.0,
        callbacks=[Listener()],
    )  # fmt: skip
    trainer.train()
    alphas = [p for n, p in trainer.model.named_parameters() if n.endswith("_alpha")]
    group = trainer.optimizer.param_groups[-1]
    assert {id(p) for p in group["params"]} == {id(p) for p in alphas} and group["weight_decay"] == 0.0
    assert sum(len(g["params"]) for g in trainer.optimizer.param_groups) == len(list(trainer.model.parameters()))
    layers = next(logs for logs in heard if "fourbit/transformer.h.0.mlp.c_fc/g_dgrad/sqnr_db" in logs)
    assert len(layers) % 3 == 0 and len(layers) > 30
    means = next(logs for logs in heard if "fourbit_g_dgrad_sqnr_db" in logs)
    mine = [v for name, v in layers.items() if name.endswith("/g_dgrad/sqnr_db")]
    assert means["fourbit_g_dgrad_sqnr_db"] == pytest.approx(sum(mine) / len(mine)) and "loss" in means


def test_phases_follow_the_trainers_steps(tmp_path):
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            spec = next(iter(fb.quantized_layers(model).values())).quant.spec
            seen.append(spec.x_fprop is None)

    changes = {"max_steps": 8, "save_strategy": "no", "gradient_accumulation_steps": 1}
    FourBitTrainer(
        vit(), arguments(tmp_path, **changes), train_dataset=pictures(), recipe="nvfp4-bf16-end", callbacks=[Watch()]
    ).train()
    assert seen == [False] * 7 + [True]  # 82 % of 8 steps


@pytest.mark.slow
def test_without_this_module_the_folder_gives_the_float_model(tmp_path):
    import subprocess
    import sys

    model = convert(gpt2(), "ibm2020")
    model(input_ids=tokens()[0]["input_ids"][None], labels=tokens()[0]["labels"][None]).loss.backward()
    save_pretrained(model, tmp_path)
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A; m = A.from_pretrained(sys.argv[1]); "
        "print(type(m.transformer.h[0].mlp.c_fc).__module__, float(m.transformer.h[0].mlp.c_fc.weight.sum()))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-800:]
    module, total = done.stdout.split()
    assert module == "transformers.pytorch_utils"
    assert float(total) == float(model.transformer.h[0].mlp.c_fc.weight.sum())
    assert "fourbit" in done.stderr  # transformers says which method it skips


def test_what_cannot_be_trained_is_said(tmp_path):
    def trainer(model, **changes):
        return FourBitTrainer(model, arguments(tmp_path), train_dataset=tokens(), **changes)

    with pytest.raises(UserError, match="no quantized layer: name a recipe"):
        trainer(gpt2())
    with pytest.raises(UserError, match="scales the loss"):
        trainer(gpt2(), recipe="ibm2020-global-scale")
    for recipe in ("nvfp4-fqt-trigger", "luq-fnt"):
        with pytest.raises(UserError, match="which this trainer cannot carry out"):
            trainer(gpt2(), recipe=recipe).train()
    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(UserError, match="does not have the clip values"):
        trainer(model, recipe="ibm2020", optimizers=(optimizer, None)).create_optimizer()
    folder = tmp_path / "checkpoint-2"
    gpt2().save_pretrained(folder)
    with pytest.raises(UserError, match=r"has no fourbit\.safetensors: it was not saved by this trainer"):
        trainer(gpt2(), recipe="ibm2020")._load_from_checkpoint(str(folder))
    save_pretrained(convert(gpt2(), "luq"), folder)
    with pytest.raises(UserError, match="trained with recipe='luq', not with recipe='ibm2020'"):
        trainer(gpt2(), recipe="ibm2020")._load_from_checkpoint(str(folder))
    with pytest.raises(UserError, match="belongs to another model or recipe"):
        load_state(convert(gpt2(), "ibm2020"), folder / "fourbit.safetensors")
    (folder / "fourbit.safetensors").write_bytes(b"\x08")
    with pytest.raises(UserError, match="cannot be read"):
        trainer(gpt2(), recipe="luq")._load_from_checkpoint(str(folder))
    with pytest.raises(UserError, match="does not say which recipe"):
        save_pretrained(fb.convert(gpt2(), "luq"), folder)


def test_other_trainers_take_the_mixin(tmp_path):
    class Seq2Seq(FourBitMixin, transformers.Seq2SeqTrainer):
        pass

    trainer = Seq2Seq(
        model_init=gpt2,
        args=transformers.Seq2SeqTrainingArguments(
            output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
        ),
        train_dataset=tokens(),
        recipe="luq",
    )
    trainer.train()
    assert fb.quantized_layers(trainer.model)
