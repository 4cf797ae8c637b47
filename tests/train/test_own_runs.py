"""Networks, recipes and settings of one's own from the command line, and the list of runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_files import tensors

from fourbit import models
from fourbit.cli import main
from fourbit.errors import UserError
from fourbit.train import TrainConfig, load
from fourbit.train._folder import RunFolder

NET = """
from torch import nn
import beside

class Net(nn.Sequential):
    def __init__(self, num_classes, in_channels=1):
        super().__init__(nn.Conv2d(in_channels, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

def odd(num_classes):
    return 3

def narrow(num_classes):
    return Net(num_classes + 1)

def broken(num_classes):
    raise RuntimeError("oh")

def demanding(depth):
    return depth
"""

SETTINGS = """
model = "net.py:Net"
data = "digits"
recipe = "mine.toml"
epochs = 1
batch-size = 32
log_to = []
milestones = [0.5]
observe_every = 0
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    Path("beside.py").write_text("")
    Path("run.toml").write_text(SETTINGS)
    assert main(["recipes", "save", "ibm2020", "--to", "mine.toml"]) == 0


def failing(capsys, *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_run_of_ones_own_network_and_recipe_goes_on_with_the_same_alone(capsys):
    command = ["train", "--config", "run.toml", "--out", "a", "--lr", "0.05"]
    assert main(command) == 0
    written = json.loads(Path("a/config.json").read_text())
    assert (written["model"], written["recipe"], written["lr"], written["milestones"]) == (
        "net.py:Net",
        "mine.toml",
        0.05,
        [0.5],
    )
    assert main(["train", "--model", "net.py:Net", "--data", "digits", "--recipe", "ibm2020", "--epochs", "1"]
        + ["--batch-size", "32", "--log-to=none", "--milestones", "0.5", "--observe-every", "0", "--lr", "0.05"]
        + ["--out", "b"]) == 0  # fmt: skip
    assert tensors(Path("a")) == tensors(Path("b"))
    Path("mine.toml").write_text(Path("mine.toml").read_text().replace("fp4_r4_even", "fp4_r2"))
    assert 'has changed since the run in a began (rules[3].spec.g_dgrad.format: "fp4_r4_even" -> "fp4_r2")' in failing(
        capsys, *command, "--resume"
    )
    with pytest.raises(UserError, match=r"is code, net\.py:Net, which is not run because a folder says so"):
        load(Path("a"))
    assert load(Path("a"), model="net.py:Net").model[2].spec.g_dgrad.format.name == "fp4_r4_even"
    Path("net.py").write_text(NET + "\n# changed\n")
    Path("mine.toml").write_bytes(Path("a/recipe.toml").read_bytes())
    assert "is of another run, with model file with the digest" in failing(capsys, *command, "--resume")


def test_recipes_of_one_name_do_not_share_a_folder(capsys):
    Path("x").mkdir()
    Path("x/mine.toml").write_bytes(Path("mine.toml").read_bytes())
    words = ["compare", "--model", "digits_cnn", "--data", "digits", "--recipes", "mine.toml,x/mine.toml"]
    assert "recipes has mine twice" in failing(capsys, *words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("net.py:nothing", "unknown function in net.py 'nothing'"),
        ("net.py:odd", "gives int, but must give a torch.nn.Module"),
        ("net.py:broken", "cannot make a network (RuntimeError: oh)"),
        ("net.py:demanding", "cannot make a network (TypeError"),
        ("net.py:narrow", "logits [2, 10] are needed"),
        ("gone.py:Net", "there is no file gone.py"),
        ("net.py:Net?kind=smell", "unknown kind of network 'smell'"),
        ("net.py:Net?kind=text", "reads text, but digits has images"),
    ],
)
def test_a_network_that_is_none_is_one_sentence(capsys, name, words):
    assert words in failing(capsys, "train", "--model", name, "--data", "digits", "--batch-size", "16", "--out", "n")


def test_a_file_with_an_error_in_it_is_one_sentence(capsys):
    Path("bad.py").write_text("def f(:")
    assert "bad.py cannot be loaded (SyntaxError" in failing(capsys, "explain", "--model", "bad.py:f")
    assert models.is_own("a/b.py:f") and not models.is_own("hf:b.py") and not models.is_own("resnet20")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch = 1", "unknown field 'epoch': did you mean 'epochs'"),
        ("epochs = 1.5", "is not a whole number"),
        ("epochs = {}", "epochs is {}, but must be a text, a number"),
        ("epochs = ", "is not a TOML file"),
        ("lr = nan", "lr is nan"),
        ("optimizer = 'sdg'", "sgd"),
        ('out = "a\\u0000"', "out is "),
    ],
)
def test_settings_that_are_wrong_are_one_sentence(capsys, text, words):
    Path("bad.toml").write_text(text)
    assert words in failing(capsys, "train", "--config", "bad.toml", "--model", "digits_cnn", "--data", "digits")
    assert "cannot be read" in failing(capsys, "compare", "--config=no.toml")


def test_a_flag_goes_before_the_file(capsys):
    Path("s.toml").write_text('epochs = 0\nlog_to = ["tensorboard"]\n')
    assert "epochs is 0" in failing(capsys, "train", "--config", "s.toml")
    command = [
        "train",
        "--config=s.toml",
        "--epochs=1",
        "--log-to=none",
        "--model=digits_cnn",
        "--data=digits",
        "--batch-size=16",
    ]
    assert main([*command, "--max-steps=1", "--recipe=fp32", "--out=s"]) == 0
    assert not Path("s/tb").exists()


def test_runs_are_listed_with_their_state(capsys):
    small = [
        "--model=digits_cnn",
        "--data=digits",
        "--recipe=fp32",
        "--max-steps=1",
        "--batch-size=16",
        "--log-to=none",
    ]
    for name in ("done", "bad", "broken"):
        assert main(["train", *small, f"--out=r/{name}"]) == 0
    Path("r/bad/checkpoint/model.safetensors").write_bytes(b"")
    Path("r/broken/config.json").write_text("{")
    begun = RunFolder(Path("r/begun[red]"))
    begun.path.mkdir()
    begun.create(TrainConfig(recipe="<script>"), {})
    capsys.readouterr()
    with begun.held():
        assert main(["runs", "r"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "r/begun[red] resnet20 cifar10 <script> 0 running" in text
    assert "r/done digits_cnn digits fp32 0 finished 1" in text
    assert text.count("damaged:") == 2 and "does not match its checksum" in text
    assert main(["runs", "r/begun[red]"]) == 0
    assert "stopped" in capsys.readouterr().out


def test_no_run_is_one_sentence(capsys):
    assert "runs is not a folder" in failing(capsys, "runs")
    Path("empty").mkdir()
    assert "there is no run in empty" in failing(capsys, "runs", "empty")
