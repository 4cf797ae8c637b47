"""The questions that the paper leaves open, as rows of a table of their own, and the networks that they and the figures
train."""

from __future__ import annotations

from collections.abc import Mapping

from fourbit.reproduce._row import Settings, TableRow
from fourbit.reproduce.paper import CIFAR

QUESTIONS: list[TableRow] = []


def _networks(paper: str, small: str, narrow: str = "", epochs: int = 3, warmup: int = 0) -> dict[str, Settings]:
    half: Settings = {
        "model": narrow,
        **CIFAR,
        "image_size": 16,
        "epochs": 160,
        "warmup_steps": warmup,
        "observe_every": 390,
    }
    smoke = {"model": "digits_cnn", "data": "digits", "batch_size": 128, "lr": 0.1, "weight_decay": 1e-4, "epochs": 4}
    scales: dict[str, Settings] = {
        "paper": {"model": paper, **CIFAR, "epochs": 160, "keep_every": 8},
        "small": {"model": small, **CIFAR, "epochs": epochs, "warmup_steps": warmup, "keep_every": 1},
        "smoke": {**smoke, "keep_every": 1},
    }
    return scales | {"converged": half} if narrow else scales


NETWORKS = {
    "residual": _networks("resnet18", "resnet20", "resnet20?width=8"),
    "bottleneck": _networks("resnet50", "resnet29", warmup=200),
    "depthwise": _networks("mobilenet_v2", "mobilenet_v2", "mobilenet_v2?width=0.5", epochs=1),
}
"""What the figures and questions train, in place of the paper's ResNet-18, ResNet-50 and MobileNetV2 on ImageNet. Runs of one
network are shared by all of them. The bottleneck network warms up: at a learning rate of 0.1 from the first step on its loss
rises to 7 within 20 steps with INT4 operands, and three epochs do not make up for it. `converged`: the paper's 160 epochs and
its drops of the learning rate, with half the channels on pictures of 16x16 pixels, so that a run takes one to three hours of
one core."""


def _question(
    name: str,
    title: str,
    *recipes: str,
    pairs: tuple[tuple[str, str], ...],
    network: str = "residual",
    rates: tuple[float, ...] = (),
    lengths: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    columns, scales = ("fp32", *recipes), NETWORKS[network]
    QUESTIONS.append(
        TableRow(
            "questions",
            name,
            title,
            "test accuracy %",
            {},
            "",
            columns,
            scales,
            rates=rates,
            lengths=lengths or {},
            pairs=pairs,
        )
    )


_question(
    "length",
    "Does the gap to FP32 close when training goes on?",
    "int4-fwd",
    "ibm2020",
    "ibm2020-dw8",
    "ibm2020-luq",
    "fourbit",
    pairs=(("ibm2020", "int4-fwd"), ("ibm2020-dw8", "ibm2020"), ("ibm2020-luq", "ibm2020"), ("fourbit", "ibm2020")),
    lengths={"paper": (10, 40, 160), "converged": (3, 10, 30, 80, 160), "small": (1, 3), "smoke": (1, 4)},
)


_question(
    "radix",
    "Radix 2, 4, 8, 16, one phase, GradScale for all",
    "ibm2020-121",
    "ibm2020-radix2",
    "ibm2020-no-tpr",
    "ibm2020-radix8",
    "ibm2020-radix16",
    pairs=tuple(("ibm2020-no-tpr", f"ibm2020-{other}") for other in ("radix2", "121", "radix8", "radix16")),
)
_question(
    "phases",
    "Are two phases more than one extra bit, and than stochastic rounding?",
    "ibm2020-no-tpr",
    "ibm2020",
    "ibm2020-swapped",
    "ibm2020-fp5",
    "ibm2020-stochastic",
    pairs=(
        ("ibm2020", "ibm2020-no-tpr"),
        ("ibm2020", "ibm2020-swapped"),
        ("ibm2020-fp5", "ibm2020"),
        ("ibm2020-stochastic", "ibm2020"),
    ),
)
_question(
    "gradscale",
    "One scale per channel, per layer, for all layers",
    "ibm2020-channel-gradscale",
    "ibm2020",
    "ibm2020-global-scale",
    "ibm2020-radix2",
    "ibm2020-radix2-global-scale",
    pairs=(
        ("ibm2020-channel-gradscale", "ibm2020"),
        ("ibm2020", "ibm2020-global-scale"),
        ("ibm2020-radix2", "ibm2020-radix2-global-scale"),
    ),
)
_question(
    "fp8",
    "Which convolutions need FP8 gradients: 1x1 (all, bottom, top) or 3x3?",
    "ibm2020",
    "ibm2020-1x1fp8",
    "ibm2020-bottom1x1fp8",
    "ibm2020-top1x1fp8",
    "ibm2020-3x3fp8",
    pairs=(
        ("ibm2020-1x1fp8", "ibm2020"),
        ("ibm2020-1x1fp8", "ibm2020-3x3fp8"),
        ("ibm2020-bottom1x1fp8", "ibm2020-top1x1fp8"),
    ),
    network="bottleneck",
)
_question(
    "depthwise",
    "A network with depthwise convolutions, which stay in FP16",
    "int4-fwd",
    "ibm2020",
    "ibm2020-dw8",
    "ibm2020-bottom1x1fp8",
    "ibm2020-luq",
    pairs=(("ibm2020-dw8", "ibm2020"), ("ibm2020-bottom1x1fp8", "ibm2020"), ("ibm2020-luq", "ibm2020")),
    network="depthwise",
)
_question(
    "multiplier",
    "Least error (1.6), no bias (1.85), or a correction behind the GEMM, each at its best learning rate?",
    "ibm2020",
    "ibm2020-m185",
    "ibm2020-corrected",
    pairs=(
        ("ibm2020-m185", "ibm2020"),
        ("ibm2020-corrected", "ibm2020"),
        ("ibm2020-m185", "ibm2020-corrected"),
    ),
    rates=(0.05, 0.1, 0.2),
)
_question(
    "zerosum",
    "Does restoring the channel sums of the gradient help?",
    "ibm2020",
    "ibm2020-zerosum",
    pairs=(("ibm2020-zerosum", "ibm2020"),),
)
_question(
    "luq",
    "Stochastic rounding at equal cost",
    "ibm2020",
    "ibm2020-corrected",
    "ibm2020-stochastic",
    "ibm2020-luq",
    "luq",
    "fourbit",
    pairs=(
        ("ibm2020-luq", "ibm2020"),
        ("fourbit", "ibm2020"),
        ("fourbit", "ibm2020-luq"),
        ("ibm2020-luq", "luq"),
        ("ibm2020-stochastic", "ibm2020"),
    ),
)
