"""What can be set about a run: a frozen dataclass whose fields are at once the command-line flags.

`Settings` holds what all runs of a comparison share. `TrainConfig` adds one recipe and one seed, `CompareConfig` several.
The string below each field is its help text; `None` stands for a default that depends on other fields and is filled in
by `validated` (see `_validate`), so that `config.json` shows the numbers that were used.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter, Token


def _whole(type_: Any, tokens: Sequence[Token]) -> int:
    """A whole number; 1.5 is an error and not 2."""
    try:
        return whole_number(tokens[0].value)
    except ValueError:
        raise ValueError(f'"{tokens[0].value}" is not a whole number below 2^63') from None


def whole_number(text: str) -> int:
    """A whole number that fits into 64 bits."""
    value = int(text)
    if abs(value) >= 2**63:
        raise ValueError
    return value


def _fractions(type_: Any, tokens: Sequence[Token]) -> tuple[float, ...]:
    """Numbers separated by commas."""
    try:
        return tuple(float(part) for part in tokens[0].value.split(",") if part.strip())
    except ValueError:
        raise ValueError(f'"{tokens[0].value}" is not a list of numbers such as 0.5,0.75') from None


def words(type_: Any, tokens: Sequence[Token]) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(part.strip() for part in tokens[0].value.split(",") if part.strip())


TRACKERS = ("tensorboard", "wandb", "trackio")
"""What `log_to` may name."""


def _trackers(type_: Any, tokens: Sequence[Token]) -> tuple[str, ...]:
    """Names of trackers, or none."""
    return () if tokens[0].value.strip() == "none" else words(type_, tokens)


def whole_numbers(type_: Any, tokens: Sequence[Token]) -> tuple[int, ...]:
    """Whole numbers separated by commas."""
    try:
        return tuple(whole_number(part) for part in words(type_, tokens))
    except ValueError:
        raise ValueError(f'"{tokens[0].value}" is not a list of whole numbers such as 0,1,2') from None


WHOLE = Parameter(converter=_whole)
TASK = Parameter(group=Group("What to train", sort_key=1))
OPTIMIZATION = Parameter(group=Group("Optimization", sort_key=2))
EXECUTION = Parameter(group=Group("Execution", sort_key=3))
RECORDS = Parameter(group=Group("Records", sort_key=4))

DEFAULT_LENGTH = 35
"""Tokens of a row of text where neither the user nor the network says how many."""


MAX_THREADS = 4096
"""More than any machine has cores."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything but recipe, seed and folder."""

    model: Annotated[str, TASK] = "resnet20"
    """Network; `fourbit models` lists them. hf:NAME, timm:NAME, torchvision:NAME: one of another library.
    path/to/file.py:function: your own."""
    data: Annotated[str, TASK] = "cifar10"
    """Data set; `fourbit data` lists them. images, text, speech, translation: your own. hf:OWNER/NAME: one of the hub."""
    data_dir: Annotated[Path | None, TASK] = None
    """Folder with the files of the data set. None: the Hugging Face hub."""
    columns: Annotated[tuple[str, ...], TASK, Parameter(converter=words, n_tokens=1, negative="")] = ()
    """Columns of your own tables, separated by commas: image and label, sound and label, the text, or source and target
    language. None: found by name and type."""
    image_size: Annotated[int | None, TASK, WHOLE] = None
    """Height and width to which images are scaled: your own, or (cifar10, fashion_mnist) averaged to a divisor of theirs.
    None: theirs, if all have the same."""
    mirror: Annotated[bool, TASK, Parameter(negative="")] = False
    """Mirror your own training images at random."""
    tokenizer: Annotated[str | None, TASK] = None
    """Tokens of a text: characters, bytes, words, bpe (bpe:4096: pieces of words, learned from the training text), or the path
    of a tokenizer.json; None: characters, or what the data set is known for. For your own translations the path of a
    tokenizer.json; None: one is made."""
    only: Annotated[str | None, TASK] = None
    """Quantize only layers whose dotted name contains a match of this regular expression; `fourbit explain` shows which."""
    skip: Annotated[str | None, TASK] = None
    """Keep layers whose dotted name contains a match in full precision."""
    epochs: Annotated[int, TASK, WHOLE] = 5
    """Passes over the training data."""
    max_steps: Annotated[int | None, TASK, WHOLE] = None
    """End after this many optimizer steps, if the epochs are not over before; the schedule fits the shorter run."""
    batch_size: Annotated[int, TASK, WHOLE] = 128
    """Images, rows of text, utterances or pairs of sentences per forward pass, over all processes together."""
    eval_batch_size: Annotated[int | None, TASK, WHOLE] = None
    """The same for the evaluation. None: the batch size; for images at least 256."""
    max_test_batches: Annotated[int | None, TASK, WHOLE] = None
    """Evaluate on the first so many batches only. None: on all test data."""
    augment: Annotated[bool, TASK] = True
    """Shift and mirror training images as the data set prescribes."""
    sequence_length: Annotated[int | None, TASK, WHOLE] = None
    """Tokens of a row of text per forward pass; gradients do not go back further. None: the context of gpt, else 35."""
    beam_size: Annotated[int, TASK, WHOLE] = 1
    """Translations of a test sentence that are followed at a time; 1 is greedy."""

    optimizer: Annotated[Literal["sgd", "adam", "adamw", "muon", "lars"], OPTIMIZATION] = "sgd"
    """Update rule. muon: Muon for the matrices of hidden layers, AdamW for all else; it multiplies in bfloat16, which takes
    seconds a step on CPUs that do not. lars: sgd whose steps are a share of each layer's length."""
    lr: Annotated[float | None, OPTIMIZATION] = None
    """Learning rate. None: 0.1 for sgd, 0.01 for lars, 0.001 for the others."""
    momentum: Annotated[float, OPTIMIZATION] = 0.9
    """Momentum of sgd and lars."""
    nesterov: Annotated[bool, OPTIMIZATION] = False
    """Nesterov's momentum, for sgd."""
    beta2: Annotated[float, OPTIMIZATION] = 0.999
    """Decay of the squared gradients of adam, adamw and muon's AdamW, per step."""
    weight_decay: Annotated[float, OPTIMIZATION] = 1e-4
    """Weight decay."""
    alpha_weight_decay: Annotated[float | None, OPTIMIZATION] = None
    """Weight decay of the clip values of PACT. None: as of the weights."""
    alpha_lr_factor: Annotated[float, OPTIMIZATION] = 1.0
    """Learning rate of the clip values of PACT over that of the weights; 0: they stay what the first batch made them."""
    schedule: Annotated[Literal["step", "cosine", "wsd", "inverse_sqrt", "constant"], OPTIMIZATION] = "step"
    """How the learning rate falls: at milestones, along half a cosine to 0, in a straight line to 0 at the end (warm-up,
    stable, decay), with the root of the steps, or not at all."""
    milestones: Annotated[tuple[float, ...], OPTIMIZATION, Parameter(converter=_fractions, n_tokens=1, negative="")] = (
        0.5,
        0.75,
    )
    """Where the step schedule decays, as fractions of the run, separated by commas."""
    lr_decay: Annotated[float, OPTIMIZATION] = 0.1
    """Factor at each milestone."""
    decay_share: Annotated[float, OPTIMIZATION] = 0.2
    """Share of the run over which wsd falls."""
    warmup_steps: Annotated[int, OPTIMIZATION, WHOLE] = 0
    """Steps over which the learning rate first rises in proportion."""
    label_smoothing: Annotated[float, OPTIMIZATION] = 0.0
    """Share of the target spread over all classes; the test loss goes without."""
    gradient_clip: Annotated[float | None, OPTIMIZATION] = None
    """Largest norm of the gradient of all parameters together. None: no limit."""
    loss_scale_interval: Annotated[int, OPTIMIZATION, WHOLE] = 200
    """Steps without overflow before the loss scale doubles, of recipes that have one scale for all layers."""
    grad_accumulation: Annotated[int, OPTIMIZATION, WHOLE] = 1
    """Batches per optimizer step; the gradients are averaged."""

    device: Annotated[Literal["auto", "cpu", "cuda"], EXECUTION] = "auto"
    """Where to compute. auto: the GPU if there is one."""
    workers: Annotated[int | None, EXECUTION, WHOLE] = None
    """Processes that decode images which do not fit into memory. None: one less than there are cores, at most 8."""
    threads: Annotated[int | None, EXECUTION, WHOLE] = None
    """CPU threads of torch. None: torch's own choice, which is too many where other programs keep the cores busy:
    threads that wait for each other then cost more than they give."""
    autocast: Annotated[Literal["none", "bf16"], EXECUTION] = "none"
    """Arithmetic of what is not quantized: float32, or bfloat16 where torch deems it safe."""
    channels_last: Annotated[bool, EXECUTION] = True
    """Memory layout NHWC, which convolutions like better."""
    tune_malloc: Annotated[bool, EXECUTION] = True
    """Let glibc keep large freed blocks for reuse: shorter steps on the CPU, no effect elsewhere."""
    products: Annotated[Literal["fast", "exact"], EXECUTION] = "fast"
    """fast: where the platform's library rounds the results of a product to bfloat16 (some gradients), that is
    accepted. exact: every result is rounded once, to the recipe's output format."""
    fuse: Annotated[bool, EXECUTION] = True
    """Run convolution, batch normalization, activation and quantization as one, where there are kernels for it."""

    log_every: Annotated[int, RECORDS, WHOLE] = 10
    """Steps between two lines with loss, accuracy and scales in metrics.jsonl."""
    observe_every: Annotated[int | None, RECORDS, WHOLE] = None
    """Steps between two observations of the operands of all quantized layers; the last step is observed too. 0: never.
    None: about 20 of them in a run, and at most 100 steps between two."""
    checkpoint_every: Annotated[int, RECORDS, WHOLE] = 1
    """Epochs between two checkpoints; 0: only at the end or when interrupted."""
    keep_every: Annotated[int, RECORDS, WHOLE] = 0
    """Epochs between two checkpoints that stay, in checkpoints/epoch-N; 0: only the newest one stays, in checkpoint."""
    sample_tokens: Annotated[int, RECORDS, WHOLE] = 100
    """Tokens that a language model writes at the end of its training, to sample.txt; 0: none."""
    on_nonfinite: Annotated[Literal["stop", "skip", "ignore"], RECORDS] = "stop"
    """At NaN or infinity in the loss, a layer or a gradient: stop, leave out that step, or go on regardless."""
    log_to: Annotated[tuple[str, ...], RECORDS, Parameter(converter=_trackers, n_tokens=1, negative="")] = (
        "tensorboard",
    )
    """Where the numbers go besides metrics.jsonl, separated by commas: tensorboard (the folder tb of the run), wandb, trackio;
    or none."""
    warn: Annotated[bool, RECORDS] = True
    """Say what goes wrong while it does, each kind once: what `fourbit diagnose` finds."""
    progress: Annotated[bool, RECORDS] = True
    """Show a progress bar, if the output is a terminal."""

    def data_options(self) -> dict[str, Any]:
        """The options of `fourbit.data.load` that are set."""
        options = {name: getattr(self, name) for name in ("columns", "image_size", "mirror", "tokenizer")}
        return {name: value for name, value in options.items() if value not in (None, False, ())}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """One run.

    >>> TrainConfig(model="digits_cnn", data="digits", seed=3).command()
    'fourbit train --model digits_cnn --data digits --seed 3'
    """

    recipe: Annotated[str, TASK] = "ibm2020"
    """How layers are quantized; `fourbit recipes` lists them. fp32: not at all. path/to/recipe.toml: your own."""
    seed: Annotated[int, TASK, WHOLE] = 0
    """Seed of weights, data order, augmentation and stochastic rounding."""
    out: Annotated[Path | None, RECORDS] = None
    """Folder of the run. None: runs/MODEL-DATA-RECIPE-seedSEED."""

    def convert_options(self) -> dict[str, Any]:
        """The options of `fourbit.convert` that make the numbers; `fuse` makes none."""
        return {name: getattr(self, name) for name in ("seed", "products", "only", "skip")}

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON has them, in the order recipe and seed first."""
        first = ("model", "data", "recipe", "seed")
        values = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {name: values[name] for name in (*first, *(n for n in values if n not in first))}

    def command(self, *extra: str, program: str = "fourbit") -> str:
        """The command line that makes this run."""
        return " ".join([program, "train", *_flags(self), *extra])


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Settings):
    """Runs that differ in recipe and seed alone."""

    recipes: Annotated[tuple[str, ...], TASK, Parameter(converter=words, n_tokens=1, negative="")] = (
        "fp32",
        "int4-fwd",
        "ibm2020",
    )
    """Recipes, or files of recipes, separated by commas."""
    seeds: Annotated[tuple[int, ...], TASK, Parameter(converter=whole_numbers, n_tokens=1, negative="")] = (0, 1, 2)
    """Seeds, separated by commas."""
    out: Annotated[Path, RECORDS] = Path("runs/compare")
    """Folder with one folder per run, table.md and table.json."""

    def run(self, recipe: str, seed: int) -> TrainConfig:
        """One of the runs."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(Settings)}
        return TrainConfig(**shared, recipe=recipe, seed=seed, out=self.out / f"{label_of(recipe)}-seed{seed}")

    def runs(self) -> list[TrainConfig]:
        """All of them, one seed after the other, so that an early look shows every recipe."""
        return [self.run(recipe, seed) for seed in self.seeds for recipe in self.recipes]

    def command(self, program: str = "fourbit") -> str:
        """The command line that makes, or goes on with, this comparison."""
        return " ".join([program, "compare", *_flags(self)])


def label_of(recipe: str) -> str:
    """What folders call a recipe: its name, or that of its file without folder and ending."""
    return Path(recipe).stem if recipe.endswith(".toml") else recipe


def _plain(value: Any) -> Any:
    """A field as JSON has it."""
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _flags(config: Settings) -> list[str]:
    """The flags for the fields that differ from their defaults."""
    flags = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        name = field.name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            text = ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
            flags += [f"--{name}", shlex.quote(text)]
    return flags
