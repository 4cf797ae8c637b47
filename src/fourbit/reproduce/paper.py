"""The rows of Tables 1 to 3 at three scales:

    paper   the paper's schedule, as far as it is known, on its data set
    small   an hour or two on a CPU of two cores for all columns of a row and one seed
    smoke   a minute: shows that everything runs, and nothing about accuracy

The paper gives batch size and epochs of few networks only (ResNet-18 on CIFAR-10: 128 and 160, a first drop of the learning
rate at about 82; ResNet-18 and ResNet-50 on ImageNet: 256 and 100, drops at 30, 60, 90) and says "default hyper-parameters"
for the rest. Those are our choice, written in `TableRow.scales`: the residual networks' own (learning rate 0.1, momentum
0.9, weight decay 1e-4, divided by 10 at half and at three quarters) for CIFAR-10, Zaremba et al.'s model with plain SGD
for the Penn Treebank, Vaswani et al.'s schedule (100,000 steps of about 25,000 tokens) for translation, and for ImageNet
momentum 0.9 with the learning rate and weight decay written there, with the paper's 100 epochs and drops for the residual
networks.
"""

from __future__ import annotations

from fourbit.reproduce._row import COLUMNS, Settings, TableRow

PAPER: list[TableRow] = []

CIFAR = {"data": "cifar10", "batch_size": 128, "lr": 0.1, "weight_decay": 1e-4}
SMOKE = {"batch_size": 16, "epochs": 1, "max_steps": 3, "max_test_batches": 1, "eval_batch_size": 32, "log_every": 1}


def _cifar(
    model: str,
    title: str,
    paper: tuple[float | None, ...],
    bold: str,
    small: Settings,
    columns: tuple[str, ...] = (),
    start: Settings | None = None,
) -> None:
    """`start`: a learning rate or warm-up of a network that the common ones do not train."""
    numbers = {recipe: value for recipe, value in zip(COLUMNS, paper, strict=False) if value is not None}
    common = {"model": model, **CIFAR, **(start or {})}
    scales = {
        "paper": {**common, "epochs": 160},
        "small": {**common, "schedule": "cosine", **small},
        "smoke": {**common, **SMOKE},
    }
    PAPER.append(
        TableRow("table1", model, title, "CIFAR-10 test accuracy %", numbers, bold, columns or tuple(numbers), scales)
    )


_cifar(
    "resnet20", "ResNet20 (not in the paper)", (), "", {"epochs": 10}, ("fp32", "int4-fwd", "ibm2020", "ibm2020-dw8")
)
# At 0.1 from the first step on, VGG16's loss stays at that of guessing, in FP32 as in 4 bits.
_cifar(
    "vgg16",
    "VGG16",
    (92.07, 91.81, 91.47, 91.81),
    "ibm2020",
    {"epochs": 3},
    start={"lr": 0.05, "warmup_steps": 200},
)
_cifar("googlenet", "GoogLeNet", (94.68, 94.50, 94.17, 94.12), "ibm2020", {"epochs": 1, "max_steps": 250})
_cifar("resnet18", "ResNet18", (93.01, 92.97, 92.74, 92.76), "ibm2020", {"epochs": 2})
_cifar(
    "resnet50",
    "ResNet50",
    (94.70, 94.34, 93.42, 93.77, 94.03, 94.36),
    "ibm2020-1x1fp8",
    {"epochs": 1, "max_steps": 250},
)
_cifar(
    "resnet101",
    "ResNet101",
    (95.04, 94.76, 93.79, 94.34, 94.19, 94.43),
    "ibm2020-1x1fp8",
    {"epochs": 1, "max_steps": 150, "max_test_batches": 8},
)
_cifar(
    "densenet121",
    "DenseNet121",
    (95.06, 95.08, 94.71, 94.82, None, 94.91),
    "ibm2020",
    {"epochs": 1, "max_steps": 250},
)
_cifar("mobilenet_v2", "MobileNetV2", (93.00, 92.97, 91.80, 92.39), "ibm2020-dw8", {"epochs": 2, "warmup_steps": 200})


def _numbers(*values: float) -> dict[str, float]:
    return dict(zip(COLUMNS, values, strict=False))


def _imagenet(
    name: str,
    title: str,
    model: str,
    paper: Settings,
    bold: str,
    lr: float,
    epochs: int,
    decay: float,
    small_steps: int | None = None,
) -> None:
    """At the scales small and smoke on Imagenette, ten of the classes; `small_steps`: of a network that is slow on a CPU."""
    common = {"model": model, "batch_size": 256, "lr": lr, "weight_decay": decay, "milestones": (0.3, 0.6, 0.9)}
    small = {**common, "data": "imagenette", "batch_size": 32, "lr": lr / 8, "schedule": "cosine"}
    scales = {
        "paper": {**common, "data": "imagenet", "epochs": epochs},
        "small": {**small, "epochs": 8, "max_steps": small_steps},
        "smoke": {**small, **SMOKE, "batch_size": 8},
    }
    PAPER.append(TableRow("table2", name, title, "ImageNet top-1 %", paper, bold, tuple(paper), scales))


_imagenet(
    "alexnet", "AlexNet", "alexnet", _numbers(57.56, 57.51, 56.38, 57.11), "ibm2020", lr=0.01, epochs=90, decay=5e-4
)
_imagenet(
    "resnet18",
    "ResNet18",
    "resnet18_imagenet",
    _numbers(69.40, 69.43, 68.27, 68.99),
    "ibm2020",
    lr=0.1,
    epochs=100,
    decay=1e-4,
    small_steps=1000,
)
_imagenet(
    "resnet50",
    "ResNet50",
    "resnet50_imagenet",
    _numbers(76.48, 75.76, 74.01, 74.92, 74.99, 75.51),
    "ibm2020-1x1fp8",
    lr=0.1,
    epochs=100,
    decay=1e-4,
    small_steps=250,
)
_imagenet(
    "mobilenet_v2",
    "MobileNetV2",
    "mobilenet_v2_imagenet",
    _numbers(71.85, 69.77, 68.85, 69.65),
    "",
    lr=0.05,
    epochs=150,
    decay=4e-5,
    small_steps=600,
)

_PTB = {"data": "ptb", "batch_size": 20, "optimizer": "sgd", "lr": 20.0, "momentum": 0.0, "gradient_clip": 0.25}
_PTB |= {"weight_decay": 0.0, "lr_decay": 0.5}
_THREE = ("fp32", "ibm2020", "ibm2020-dw8")
PAPER.append(
    TableRow(
        "table3",
        "ptb",
        "2-layer LSTM, PTB",
        "test perplexity",
        dict(zip(_THREE, (83.3, 85.3, 83.8), strict=True)),
        "ibm2020",
        _THREE,
        {
            "paper": {
                "model": "lstm_650",
                **_PTB,
                "epochs": 40,
                "milestones": tuple(k / 40 for k in range(16, 40, 3)),
            },
            "small": {"model": "lstm_200", **_PTB, "epochs": 8, "milestones": (0.5, 0.625, 0.75, 0.875)},
            "smoke": {"model": "lstm_200", **_PTB, "epochs": 1, "max_steps": 5, "max_test_batches": 2, "log_every": 1},
        },
        higher_is_better=False,
    )
)
_SPEECH = {"model": "bilstm_speech", "data": "spoken_digits", "optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0}
_SPEECH |= {"batch_size": 32, "gradient_clip": 1.0, "schedule": "cosine"}
PAPER.append(
    TableRow(
        "table3",
        "swb300",
        "4-layer biLSTM, SWB300 (here: spoken digits)",
        "word error rate %",
        dict(zip(_THREE, (9.9, 11.3, 10.4), strict=True)),
        "ibm2020-dw8",
        _THREE,
        {
            "small": {**_SPEECH, "epochs": 12},
            "smoke": {**_SPEECH, "epochs": 1, "max_steps": 3, "max_test_batches": 1, "log_every": 1},
        },
        missing="SWB300 is not free; spoken digits of unseen speakers stand in for it at the scales small and smoke",
        higher_is_better=False,
    )
)
_TRANSLATION = {"optimizer": "adam", "beta2": 0.98, "label_smoothing": 0.1, "weight_decay": 0.0}
_MULTI30K = {**_TRANSLATION, "model": "transformer_small", "data": "multi30k", "batch_size": 64, "lr": 3e-3}
_MULTI30K |= {"schedule": "cosine", "warmup_steps": 400}
PAPER.append(
    TableRow(
        "table3",
        "wmt",
        "Transformer-base, WMT En-De (small and smoke: a small one, Multi30k)",
        "BLEU",
        dict(zip(_THREE, (27.5, 25.4, 25.9), strict=True)),
        "",
        _THREE,
        {
            "paper": {
                **_TRANSLATION,
                "model": "transformer_base",
                "data": "wmt14",
                "batch_size": 832,
                "epochs": 19,
                "max_steps": 100_000,
                "lr": 7e-4,
                "schedule": "inverse_sqrt",
                "warmup_steps": 4000,
                "beam_size": 4,
            },
            "small": {**_MULTI30K, "epochs": 6},
            "smoke": {
                **_MULTI30K,
                "epochs": 1,
                "max_steps": 3,
                "max_test_batches": 1,
                "batch_size": 16,
                "log_every": 1,
            },
        },
    )
)
