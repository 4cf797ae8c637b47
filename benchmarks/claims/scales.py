"""The radix of gradients, and who shares their scale."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.claims._claim import Claim, Group, Table, claim
from benchmarks.claims._read import digits, final, reproduced
from benchmarks.claims.questions import EIGHT, EPOCHS, SHORT, SIZES, better


@claim(Group.QUESTIONS)
def radix_4_or_2() -> Claim:
    runs, small = reproduced("questions", "radix", "ResNet-20 on CIFAR-10, 3 epochs, row `radix`"), digits(8)
    others = ("ibm2020-radix2", "ibm2020-121", "ibm2020-radix8", "ibm2020-radix16")
    shown = ("fp32", "ibm2020-no-tpr", *others)
    return Claim(
        "Radix 4 trains better than radix 2, with a scale per layer for both.",
        (runs.part("ibm2020-no-tpr", "ibm2020-radix2", least=0.0, where=EPOCHS),),
        "The paper takes powers of four because gradients spread widely ([radix 4](../../concepts/phases.md)). It "
        "compares with radix 2 under one loss scale only. Here both have GradScale, a scale for each layer, and one "
        "phase.",
        (
            SHORT,
            SIZES,
            "Radix 8 and 16 have two seeds; of a third there is an [earlier "
            "table](../reproduce/questions-radix-small/seed-0.md) only.",
        ),
        beside=(
            small.part("ibm2020-no-tpr", "ibm2020-radix2", where=EIGHT),
            *(runs.part("ibm2020-no-tpr", other, where=EPOCHS) for other in others[1:]),
            *(small.part("ibm2020-no-tpr", other, where=EIGHT) for other in others[1:]),
        ),
        runs=((runs, shown), (small, shown)),
        why=(
            "On ResNet-20 radix 2 shrinks the gradient less, but its range of 2^6 loses small gradients, and the "
            "direction suffers ([table](../cifar10-resnet20/fidelity.md)). The digits network has six layers and needs "
            "no range of 2^12.",
        ),
    )


@claim(Group.QUESTIONS)
def gradscale_radix_2() -> Claim:
    base = better(
        "Radix 2 needs a scale for each layer (GradScale).",
        "gradscale",
        "ibm2020-radix2",
        "ibm2020-radix2-global-scale",
        "GradScale gives each layer's gradient a power of two as its scale. `ibm2020-radix2-global-scale` has one loss "
        "scale for all layers, as APEX has it.",
        (
            "The scales of the layers lie 2^2 to 2^4 apart ([Fig. 3](../figures/fig3.md)), and radix 2 spans 2^6. One "
            "scale for all leaves most gradients of most layers below the smallest number.",
            "Part of the loss is APEX's slow recovery after a spike. A run whose scale may double after 20 clean steps "
            "instead of 200 (`--loss-scale-interval 20`) stands below.",
        ),
    )
    found = final("reproduce/questions-gradscale-small/interval20-seed0")
    table = Table(
        "One loss scale that doubles after 20 clean steps, seed 0",
        ("recipe", "test accuracy %"),
        (("`ibm2020-radix2-global-scale`", f"{found['test_metric']:.2f}"),),
    )
    return replace(base, tables=(table,))


@claim(Group.QUESTIONS)
def gradscale_radix_4() -> Claim:
    return better(
        "Radix 4 trains better with a scale for each layer (GradScale) than with one for all.",
        "gradscale",
        "ibm2020",
        "ibm2020-global-scale",
        "The paper has 69.0 % with GradScale and 67.6 % without it, for ResNet-18 on ImageNet.",
        ("The range of radix 4 does what a scale would: that is the likely reason why the difference is small.",),
    )


@claim(Group.QUESTIONS)
def scale_per_channel() -> Claim:
    return better(
        "A scale for each channel trains better than one for each layer.",
        "gradscale",
        "ibm2020-channel-gradscale",
        "ibm2020",
        "A reviewer of the paper asked for it. `ibm2020-channel-gradscale` has one GradScale for each output channel.",
        (),
    )
