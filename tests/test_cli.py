"""The command line: what it prints, its exit codes, and that a mistake is one line and changes nothing."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fourbit import formats
from fourbit._version import __version__
from fourbit.cli import main
from fourbit.cli._terminal import program
from fourbit.train import CompareConfig, TrainConfig

DIGITS = ("--model", "digits_cnn", "--data", "digits", "--recipe", "fp32", "--log-to=none")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def ctrl_c():
    """As in a terminal, also where the tests run in the background and inherit that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail as a user's mistake does; returns its one line."""
    before = sorted(Path().rglob("*"))
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fourbit: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert sorted(Path().rglob("*")) == before
    return captured.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model resnt20", "unknown model 'resnt20': did you mean 'resnet20'"),
        ("--data cifar", "unknown data set 'cifar': did you mean 'cifar10'"),
        ("--recipe ibm2021", "unknown recipe 'ibm2021': did you mean 'ibm2020'"),
        ("--optimizer sdg", 'Did you mean "sgd"? See '),
        ("--schedule linear", "Choose from"),
        ("--device tpu", "Choose from"),
        ("--autocast fp16", "Choose from"),
        ("--products quick", "Choose from"),
        ("--on-nonfinite panic", "Choose from"),
        ("--epochs 0", "epochs is 0, but must be at least 1."),
        ("--epochs 1.5", '"1.5" is not a whole number'),
        ("--epochs many", '"many" is not a whole number'),
        ("--max-steps 0", "max_steps is 0"),
        ("--batch-size 0", "batch_size is 0"),
        ("--batch-size 100000", "is larger than digits's 1437 training images"),
        ("--eval-batch-size -5", "eval_batch_size is -5"),
        ("--grad-accumulation 100", "an epoch of digits has only 11 batches"),
        ("--seed -1", "seed is -1"),
        ("--lr 0", "lr is 0.0, but must be more than 0."),
        ("--lr nan", "lr is nan"),
        ("--lr inf", "lr is inf"),
        ("--lr fast", 'unable to convert "fast" into float'),
        ("--lr", "requires an argument"),
        ("--momentum 1", "momentum is 1.0, but must be at least 0 and less than 1."),
        ("--nesterov --optimizer adam", "nesterov needs optimizer sgd"),
        ("--weight-decay -1e-4", "weight_decay is -0.0001"),
        ("--alpha-weight-decay -1", "alpha_weight_decay is -1.0"),
        ("--milestones 0.5,2", "milestones is 0.5,2.0, but must be ascending fractions between 0 and 1."),
        ("--milestones half", '"half" is not a list of numbers'),
        ("--lr-decay 0", "lr_decay is 0.0"),
        ("--warmup-steps -1", "warmup_steps is -1"),
        ("--label-smoothing 1", "label_smoothing is 1.0"),
        ("--gradient-clip 0", "gradient_clip is 0.0"),
        ("--threads 0", "threads is 0"),
        ("--log-every 0", "log_every is 0"),
        ("--observe-every -1", "observe_every is -1"),
        ("--checkpoint-every -1", "checkpoint_every is -1"),
        ("--data-dir .", "digits comes with scikit-learn and reads no folder"),
        ("--data cifar10 --data-dir nowhere", "there is no data folder nowhere"),
        ("--model vgg16 --recipe ibm2020-1x1fp8", "matches no layer of this model"),
        ("--resume", "there is no run to go on with in run"),
        ("--modle resnet20", "Unknown option: --modle. Did you mean --model"),
        ("surplus", "surplus"),
    ],
)
def test_a_wrong_setting_is_one_line_and_nothing_is_written(capsys, flags, words):
    given = flags.split()
    pairs = zip(DIGITS[:6:2], DIGITS[1:6:2], strict=True)
    defaults = [word for flag, value in pairs if flag not in given for word in (flag, value)]
    assert words in fails(capsys, "train", *defaults, "--out", "run", *given)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("tarin", 'Did you mean "train"'),
        ("tarin", 'Did you mean "train"? '),
        ("compare --model digits_cnn --data digits --recipes fp32,ibm", "unknown recipe 'ibm'"),
        ("compare --recipes ,", "recipes is empty"),
        ("compare --seeds 0,x", '"0,x" is not a list of whole numbers'),
        ("compare --seed 1", "Unknown option"),
        ("report", "needs at least one run folder"),
        ("report nowhere", "nowhere is not a folder"),
        ("formats int5", "unknown format 'int5'"),
        ("formats --png x.png", "needs the name of a format"),
        (
            "formats int4 --png nowhere/x.png",
            "nowhere/x.png could not be written: there is no folder nowhere; create it",
        ),
        ("formats int4 --png x.jpg", "x.jpg is not the name of a PNG file: give one that ends in .png."),
        ("recipes ibm", "unknown recipe 'ibm'"),
        ("explain --model lenet", "unknown model 'lenet'"),
        ("explain --recipe none", "unknown recipe 'none'"),
        ("explain --input 3x32", "input is '3x32'"),
        ("explain --input 3x4x4", "image_size is 4, too small"),
    ],
)
def test_a_wrong_command_is_one_line(capsys, command, words):
    assert words in fails(capsys, *command.split())


def test_a_run_from_start_to_resume_and_report(capsys):
    flags = ["train", *DIGITS, "--epochs", "1", "--max-steps", "3", "--out", "a"]
    assert main(flags) == 0
    out = capsys.readouterr().out
    assert "max_steps: test accuracy" in out
    assert "folder: a" in out
    assert "is not empty" in fails(capsys, *flags)
    assert main([*flags, "--resume"]) == 0
    capsys.readouterr()
    assert "was made with seed 0, not 1" in fails(capsys, *flags, "--seed", "1", "--resume")
    assert main(["report", "a", "--out", "page"]) == 0
    assert Path("page/index.html").exists()


def test_compare_prints_a_table_and_skips_what_is_done(capsys):
    flags = [
        "compare",
        *DIGITS[:4],
        "--log-to=none",
        "--recipes",
        "fp32,int4-fwd",
        "--seeds",
        "0",
        "--max-steps",
        "2",
    ]
    assert main([*flags, "--out", "c"]) == 0
    first = capsys.readouterr().out
    assert "[2/2] int4-fwd seed 0" in first
    assert main([*flags, "--out", "c"]) == 0
    again = capsys.readouterr().out
    assert "[1/2]" not in again
    assert again.count("int4-fwd") == 1
    assert {p.name for p in Path("c").iterdir()} == {"fp32-seed0", "int4-fwd-seed0", "table.md", "table.json"}


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_saves_has_a_code_of_its_own_and_the_printed_command_goes_on(capsys, number, code):
    command = [sys.executable, "-m", "fourbit", "train", *DIGITS, "--batch-size", "32", "--max-steps", "250"]
    command += ["--epochs", "50", "--threads", "1", "--out", "a folder", "--log-every", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = Path("a folder/metrics.jsonl")
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    printed = next(line.strip() for line in out.splitlines() if " train --model" in line)
    assert "--resume" in printed
    assert "'a folder'" in printed
    interrupted = json.loads(metrics.read_text().splitlines()[-1])
    assert interrupted["stopped"] == "interrupted"
    assert 0 < interrupted["step"] < 250
    words = shlex.split(printed)
    assert main(words[words.index("train") :]) == 0
    steps = [record["step"] for record in map(json.loads, metrics.read_text().splitlines()) if record["kind"] == "step"]
    assert steps == list(range(1, 251))


def test_the_program_is_named_as_the_shell_finds_it(tmp_path, monkeypatch):
    script = tmp_path / "a bin" / "fourbit"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("PATH", "/nowhere")
    assert program() == shlex.quote(str(script))
    monkeypatch.setenv("PATH", str(script.parent))
    assert program() == "fourbit"
    monkeypatch.setattr(sys, "argv", [str(tmp_path / ".venv" / "fourbit")])
    assert program() == str(tmp_path / ".venv" / "fourbit")  # another one than the shell finds
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "cli.py")])
    assert program() == "fourbit"
    monkeypatch.setenv("PATH", "/nowhere")
    assert program() == f"{shlex.quote(sys.executable)} -m fourbit"


@pytest.mark.parametrize("reaction", ["pass", "raise ImportError('cannot load module more than once')"])
def test_ctrl_c_during_an_import_exits_with_130_whatever_the_module_makes_of_it(tmp_path, reaction):
    (tmp_path / "torch.py").write_text(
        f"import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt:\n    {reaction}\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from fourbit.cli import main; sys.exit(main(['models']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "fourbit: interrupted\n")


@pytest.mark.parametrize("module", ["cyclopts", "fourbit.cli", "typing"])
def test_ctrl_c_before_the_first_command_is_known_has_no_traceback(tmp_path, module):
    """The program's own imports; the start of Python itself is Python's."""
    code = f"""
import importlib.abc, signal, sys
class Meet(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)
sys.modules.pop({module!r}, None)
sys.meta_path.insert(0, Meet())
from fourbit.__main__ import run
run()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "fourbit: interrupted\n")


def test_the_second_ctrl_c_ends_the_process_whatever_goes_on():
    code = """
import signal, sys, fourbit.formats
from fourbit.cli import main
def stubborn(name):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        signal.raise_signal(signal.SIGINT)
    print("went on", flush=True)
fourbit.formats.get = stubborn
sys.exit(main(["formats", "int4"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "fourbit: interrupted\n")


def test_what_a_library_makes_of_ctrl_c_is_no_traceback(capfd, monkeypatch):
    def swallows(name: str) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise RuntimeError("the callback failed") from error

    monkeypatch.setattr("fourbit.formats.get", swallows)
    assert main(["formats", "int4"]) == 130
    assert capfd.readouterr().err == "fourbit: interrupted\n"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EACCES, "there is no permission to write it"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_a_picture_that_cannot_be_written_leaves_the_one_that_was_there(capsys, monkeypatch, number, words):
    assert main(["formats", "int4", "--png", "y.png"]) == 0
    capsys.readouterr()
    before = Path("y.png").read_bytes()

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    assert words in fails(capsys, "formats", "fp4_r2", "--png", "y.png")
    assert Path("y.png").read_bytes() == before


def test_ctrl_c_anywhere_else_exits_with_130(capfd, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fourbit.formats.get", interrupted)
    assert main(["formats", "int4"]) == 130
    assert capfd.readouterr().err == "fourbit: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_file_that_cannot_be_read_is_one_line(capsys, monkeypatch):
    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "secret")

    monkeypatch.setattr("fourbit.formats.get", forbidden)
    assert fails(capsys, "formats", "int4") == "fourbit: secret: Permission denied.\n"


def test_the_reader_of_a_pipe_may_leave_early():
    command = f"{shlex.quote(sys.executable)} -m fourbit formats fp8_152 | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("fp8_152")
    assert done.stderr == ""


@pytest.mark.parametrize("command", [["--help"], ["formats"], ["formats", "int4"], ["train", "--help"]])
def test_looking_things_up_does_not_load_torch(command):
    code = f"import sys; from fourbit.cli import main; main({command!r}); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_setting_is_a_flag_with_help(capsys):
    main(["train", "--help"])
    text = capsys.readouterr().out
    for field in TrainConfig.__dataclass_fields__:
        assert f"--{field.replace('_', '-')} " in text
    for group in ("What to train", "Optimization", "Execution", "Records"):
        assert group in text


def test_formats_lists_all_and_shows_one_code_by_code(capsys, tmp_path):
    main(["formats"])
    text = capsys.readouterr().out
    assert all(name in text for name in (*formats.names(), *formats.BLOCKS))
    assert main(["formats", "fp4_e2m1", "--png", "grid.png"]) == 0
    text = capsys.readouterr().out
    assert "0111" in text
    assert "1.75" in text  # a decision point
    assert Path("grid.png").read_bytes().startswith(b"\x89PNG")


def test_a_block_format_is_shown_by_its_parts(capsys):
    assert main(["formats", "nvfp4"]) == 0
    text = capsys.readouterr().out
    assert all(part in text for part in ("fp4_e2m1", "fp8_e4m3fn", "448 * 6", "4.5"))
    assert "draw its elements, fp4_e2m1" in fails(capsys, "formats", "nvfp4", "--png", "grid.png")


def test_a_wide_format_is_shown_by_its_range_and_binades(capsys):
    assert main(["formats", "fp16_169", "--png", "grid.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    format = formats.get("fp16_169")
    shown = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    assert shown["codes"] == "65536, of them 2 NaN and 0 infinite"
    assert shown["numbers"] == str(len(format.grid))
    assert shown["smallest"] == f"{format.smallest:.10g}"
    assert shown["largest"] == f"{format.max:.10g} and its negative"
    assert shown["threshold of zero"] == f"{format.smallest / 2:.10g}"
    one = next(line.split() for line in lines if line.split()[:1] == ["1"])
    assert one == ["1", "1.998046875", "512", "0.001953125", "0011111000000000", "0011111111111111"]
    assert Path("grid.png").read_bytes().startswith(b"\x89PNG")


def test_recipes_models_and_data_are_listed(capsys):
    from fourbit import data, models, recipes

    for command, names in (("recipes", recipes.names()), ("models", models.names()), ("data", data.names())):
        assert main([command]) == 0
        text = capsys.readouterr().out
        assert all(name in text for name in names)
    for name in recipes.names():
        assert main(["recipes", name]) == 0
    assert "fp4_r4_odd" in capsys.readouterr().out


def test_explain_shows_rules_and_shares(capsys):
    assert main(["explain", "--model", "digits_cnn", "--input", "1x8x8"]) == 0
    text = capsys.readouterr().out
    assert "features.4.0" in text
    assert "4 x 4" in text
    assert "kernels: cpu" in text
    assert "products: fast" in text


def test_doctor_finds_every_format_well(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(f"{name}: ok" in text for name in formats.names())


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_commands_are_printed_as_a_shell_reads_them():
    config = TrainConfig(lr=0.05, milestones=(0.3, 0.6), augment=False, nesterov=True, out=Path("a b"), max_steps=9)
    words = shlex.split(config.command("--resume"))
    assert words[:2] == ["fourbit", "train"]
    assert words[words.index("--milestones") :][:2] == ["--milestones", "0.3,0.6"]
    assert {"--no-augment", "--nesterov", "--resume", "a b"} <= set(words)
    compared = CompareConfig(seeds=(4, 5), recipes=("fp32",)).command()
    assert compared == "fourbit compare --recipes fp32 --seeds 4,5"


def test_a_missing_extra_is_named_with_the_command_that_installs_it(capsys, monkeypatch):
    for name in [n for n in sys.modules if n.startswith(("matplotlib", "fourbit.report"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "this command needs matplotlib" in fails(capsys, "formats", "int4", "--png", "x.png")


@pytest.mark.parametrize(("model", "input"), [("lstm_200", "12"), ("bilstm_speech", "20x13"), ("resnet20", "1x16x16")])
@pytest.mark.parametrize("command", ["explain", "memory"])
def test_networks_of_every_kind_are_explained_and_weighed(command, model, input, capsys):
    size = ["--batch-size", "4"] if command == "memory" else []
    assert main([command, "--model", model, "--input", input, "--classes", "30", *size]) == 0
    assert ("4 x 4" if command == "explain" else "saved for backward in all") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "input", "message"),
    [
        ("lstm_200", "3x32x32", "lstm_200 reads text: give the tokens of a row, such as 35"),
        ("bilstm_speech", "50", "bilstm_speech reads speech: give frames and features, such as 50x40"),
        ("resnet20", "50", "must be channels, height and width of a square image"),
    ],
)
def test_inputs_of_another_kind_are_one_line(model, input, message, capsys):
    assert main(["explain", "--model", model, "--input", input]) == 2
    assert message in capsys.readouterr().err
