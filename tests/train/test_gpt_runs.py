"""Training gpt: sequences, byte-pair tokens, samples, Muon, resuming to the bit, and what does not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from run_files import metrics, tensors

from fourbit import data, models, recipes
from fourbit.errors import UserError
from fourbit.train import TrainConfig, train
from fourbit.train._muon import MuonWithAdamW, hidden_matrices
from fourbit.train._validate import validated
from fourbit.train.tasks import make_task

MODEL = "gpt?width=64&depth=2&heads=2&context=16"
LINES = "".join(f"line {n} of the text, {n % 7} of seven\n" for n in range(120))


@pytest.fixture
def text(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FOURBIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "book.txt"
    path.write_text(LINES)
    return path


def config(text: Path, out: Path | None = None, **changes) -> TrainConfig:
    values = {
        "model": MODEL, "data": "text", "data_dir": text, "tokenizer": "bpe:300", "batch_size": 4, "epochs": 2, "max_steps": 12,
        "optimizer": "adamw", "lr": 0.003, "recipe": "fp32", "log_to": (), "threads": 1, "log_every": 1,
        "schedule": "wsd", "warmup_steps": 3, "gradient_clip": 1.0, "progress": False, "sample_tokens": 5,
    }  # fmt: skip
    return TrainConfig(**{**values, "out": out, **changes})


def test_sequences_are_all_of_the_text_without_padding_from_another_place_in_every_epoch():
    found = data.TextData("numbers", torch.arange(1000), torch.arange(9), tuple(map(str, range(1000))))
    firsts = set()
    for epoch in range(3):
        batches = list(data.sequences(found, 4, 16, 0, epoch))
        assert len(batches) == data.num_sequences(found, 4, 16) == (1000 // 16 - 1) // 4
        rows = torch.cat([torch.cat((x, y[-1:])) for x, y in batches], 1).t().tolist()
        assert all(torch.equal(x[1:], y[:-1]) for x, y in batches)
        assert all(row == list(range(row[0], row[0] + 17)) for row in rows)
        places = [row[0] for row in rows]
        assert len({p % 16 for p in places}) == 1 and len(set(places)) == len(places) and places != sorted(places)
        firsts.add(places[0] % 16)
    assert len(firsts) > 1
    again = list(data.sequences(found, 4, 16, 0, 2, start=5))
    assert all(
        torch.equal(a, b) for one, two in zip(again, batches[5:], strict=True) for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize(
    ("recipe", "optimizer"),
    [
        ("fp32", "adamw"),
        ("ibm2020", "muon"),
        pytest.param("mxfp4-rht-sr", "adamw", marks=pytest.mark.slow),
        pytest.param("nvfp4", "muon", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_stopped_goes_on_to_the_bit(text, tmp_path, signal_after, recipe, optimizer):
    settings = {"recipe": recipe, "optimizer": optimizer, "max_steps": 8}
    whole = train(config(text, tmp_path / "whole", **settings))
    signal_after(5)
    part = train(config(text, tmp_path / "part", **settings))
    assert part.stopped == "interrupted" and part.step == 5 and not (tmp_path / "part" / "sample.txt").exists()
    resumed = train(config(text, tmp_path / "part", **settings), resume=True)
    assert (resumed.test_loss, resumed.test_accuracy) == (whole.test_loss, whole.test_accuracy)
    assert tensors(tmp_path / "part") == tensors(tmp_path / "whole")
    assert (tmp_path / "part" / "sample.txt").read_text() == (tmp_path / "whole" / "sample.txt").read_text()


def test_a_run_says_how_many_tokens_a_second_it_read_and_what_the_network_writes(text, tmp_path):
    train(config(text, tmp_path / "run", max_steps=2, sample_tokens=100))
    steps = [line for line in metrics(tmp_path / "run", clock=True) if line["kind"] == "step"]
    assert all(line["tokens_per_s"] > 0 for line in steps)
    prompt, _, continuation = (tmp_path / "run" / "sample.txt").read_text().partition("\n---\n")
    test = data.load("text", text, tokenizer="bpe:300")
    assert test.text(test.test[:32].tolist()) == prompt and LINES.count(prompt) == 1
    assert len(continuation) > 100
    final = metrics(tmp_path / "run", clock=True)[-1]
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert final["tokens"] == steps[-1]["tokens"] == 2 * settings["batch_size"] * settings["sequence_length"]
    bits = final["test_loss"] / math.log(2) * len(test.test)
    assert final["bits_per_byte"] == pytest.approx(bits / len(test.text(test.test.tolist()).encode()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "optimizer"), [("fp32", "adamw"), ("fp32", "muon"), ("nvfp4", "adamw"), ("luq", "muon")]
)
def test_it_learns(text, tmp_path, recipe, optimizer):
    result = train(
        config(
            text, tmp_path / "run", recipe=recipe, optimizer=optimizer, epochs=15, max_steps=None, checkpoint_every=0
        )
    )
    assert math.exp(result.test_loss) < 6  # 300 by guessing, about 25 by the frequencies of tokens


def test_muon_trains_the_matrices_of_hidden_layers_and_adamw_the_rest():
    for name, outside in (
        (MODEL, ["embedding.weight"]),
        (f"{MODEL}&tied=false", ["embedding.weight", "classifier.weight"]),
    ):
        model = recipes.convert(models.build(name, num_classes=50), "ibm2020")
        chosen = {id(p) for p in hidden_matrices(model)}
        matrices = [n for n, p in model.named_parameters() if p.dim() == 2]
        assert [n for n, p in model.named_parameters() if p.dim() == 2 and id(p) not in chosen] == outside
        optimizer = MuonWithAdamW(recipes.param_groups(model, 0.1, 0.0), hidden_matrices(model), 0.01, (0.9, 0.99))
        assert [g["name"] for g in optimizer.param_groups] == ["muon", "weights", "alpha"]
        assert len(optimizer.param_groups[0]["params"]) == len(matrices) - len(outside) == 8


def test_muon_and_adamw_step_as_torchs_own():
    torch.manual_seed(0)
    first, second = (
        torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 6), torch.nn.Linear(6, 3)) for _ in "ab"
    )
    second.load_state_dict(first.state_dict())
    ours = MuonWithAdamW(recipes.param_groups(first, 0.1), hidden_matrices(first), 0.01, (0.9, 0.99))
    muon = torch.optim.Muon([second[0].weight, second[1].weight], 0.01, 0.1, adjust_lr_fn="match_rms_adamw")
    rest = [second[0].bias, second[1].bias, *second[2].parameters()]
    adamw = torch.optim.AdamW(rest, 0.01, (0.9, 0.99), weight_decay=0.1)
    for step in range(4):
        x = torch.randn(5, 4)
        for model, optimizers in ((first, [ours]), (second, [muon, adamw])):
            for optimizer in optimizers:
                optimizer.zero_grad()
            model(x).pow(2).mean().backward()
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
                for group in optimizer.param_groups:
                    group["lr"] = 0.01 / (step + 1)
                optimizer.step()
        ours.load_state_dict(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_network_without_a_hidden_matrix_is_refused():
    with pytest.raises(UserError, match="optimizer muon is for matrices of hidden layers, and this network has none"):
        hidden_matrices(models.build("resnet20", num_classes=10))


def test_the_rows_are_as_long_as_the_context_of_the_network(text):
    assert validated(config(text)).sequence_length == 16
    assert validated(config(text, model="lstm_200")).sequence_length == 35
    task = make_task(validated(config(text)), torch.device("cpu"), 0, 1)
    x, y = next(task.batches("train"))
    assert x.shape == y.shape == (16, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 17}, r"sequence_length is 17, but gpt\?.* reads 16 tokens: give fewer, or a larger context"),
        ({"model": "gpt?context=4096"}, "a batch has 4 sequences of 4096 tokens, but the training text .* enough for 0"),
        ({"batch_size": 900}, "a batch has 900 sequences of 16 tokens, .*: give a smaller batch size or sequence length"),
        ({"schedule": "wds"}, "unknown schedule 'wds': did you mean 'wsd'"),
        ({"decay_share": 0.0}, "decay_share is 0.0, but must be more than 0 and at most 1"),
        ({"optimizer": "moun"}, "unknown optimizer 'moun': did you mean 'muon'"),
        ({"tokenizer": "bpe:100"}, "tokenizer is bpe:100, but bpe: needs a number of tokens of at least 256"),
        ({"tokenizer": "bpe:many"}, "tokenizer is bpe:many, but bpe: needs a number of tokens"),
        ({"model": "gpt?width=100&heads=3&context=16"}, "width of gpt is 100, but 3 heads"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(text, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        train(config(text, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_files_of_text_that_cannot_be_read_are_named(text, tmp_path):
    text.write_text("")
    with pytest.raises(UserError, match="the train part of the text is empty: give more of it"):
        train(config(text, tmp_path / "run"))
    with pytest.raises(
        UserError, match=r"data is .*book.txt, a place where files are, .*: --data text --data-dir .*book.txt"
    ):
        train(config(text, tmp_path / "run", data=str(text), data_dir=None))
