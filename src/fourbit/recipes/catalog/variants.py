"""Block-scaled recipes that differ in one thing each, for the questions in which the papers contradict one another
(`fourbit reproduce debates`).

The common ground is MXFP4 with scales that truncate nothing (`mxfp4-ceil`): one level of scales, nothing saturates, so that
stochastic rounding is unbiased, and all six operands are rounded to nearest unless the name says otherwise:

    -fprop, -dgrad, -wgrad      that product alone in 4 bits
    -h32, -h32-signs, -rht      both operands of the products rotated by Hadamard 32: no signs, one sign vector, fresh signs
    -sr                         stochastic rounding: of all six operands, or of those that are named
"""

from __future__ import annotations

from dataclasses import replace

from fourbit import formats as f
from fourbit.ops import SLOTS, LayerSpec
from fourbit.quantizers import Block, BlockScale, Hadamard, QuantSpec, Rounding
from fourbit.recipes._rule import Recipe, last
from fourbit.recipes._schedule import Phase
from fourbit.recipes.catalog._base import CATALOG
from fourbit.recipes.catalog.blocks import (
    AMD_PAPER,
    FQT_PAPER,
    MX_PAPER,
    MXFP4,
    NVFP4,
    NVFP4_FQT,
    NVIDIA_PAPER,
    TE_SIGNS,
    TSENG_PAPER,
    UFP4,
    UFP4_PAPER,
    block_rules,
    everywhere,
)

FPROP, DGRAD, WGRAD = ("x_fprop", "w_fprop"), ("g_dgrad", "w_dgrad"), ("g_wgrad", "x_wgrad")
GRADIENTS = ("g_dgrad", "g_wgrad")
BACKWARD = (*DGRAD, *WGRAD)


NAMES: list[str] = []
"""Of the recipes of this file."""


def _variant(name: str, summary: str, spec: LayerSpec, source: str, phases: tuple[Phase, ...] = ()) -> Recipe:
    NAMES.append(name)
    return CATALOG.add(name, Recipe(name, block_rules(spec, last(1)), summary, source, phases))


def _changed(spec: LayerSpec, slots: tuple[str, ...], **changes: object) -> LayerSpec:
    """The quantizers of some slots with other fields."""
    return replace(spec, **{slot: replace(getattr(spec, slot), **changes) for slot in slots})


def _only(spec: QuantSpec, *slots: str) -> LayerSpec:
    return replace(everywhere(spec), **{slot: None for slot in SLOTS if slot not in slots})


_variant("mxfp4", "MXFP4 as OCP defines it in all six operands, to nearest", everywhere(MXFP4), MX_PAPER)
_BASE = replace(MXFP4, scaling=BlockScale(f.E8M0, "ceil"))
_ALL = everywhere(_BASE)
MXFP4_CEIL = _variant(
    "mxfp4-ceil", "MXFP4 with scales that truncate nothing in all six operands, to nearest", _ALL, MX_PAPER
)

for _name, _slots in (("fprop", FPROP), ("dgrad", DGRAD), ("wgrad", WGRAD)):
    _variant(f"mxfp4-ceil-{_name}", f"as mxfp4-ceil in {_name} alone", _only(_BASE, *_slots), FQT_PAPER)

for _name, _words, _turn in (
    ("h32", "Hadamard 32 without signs", Hadamard(32)),
    ("h32-signs", "Hadamard 32 with one sign vector", Hadamard(32, (*TE_SIGNS, *TE_SIGNS[::-1]))),
    ("rht", "Hadamard 32 with fresh signs", Hadamard(32, "fresh")),
):
    _variant(
        f"mxfp4-ceil-{_name}",
        f"as mxfp4-ceil, all rotated by {_words}",
        _changed(_ALL, SLOTS, transform=_turn),
        AMD_PAPER,
    )
for _name, _slots in (("fprop", FPROP), ("dgrad", DGRAD), ("wgrad", WGRAD)):
    _variant(
        f"mxfp4-ceil-rht-{_name}",
        f"as mxfp4-ceil, {_name} rotated by Hadamard 32 with fresh signs",
        _changed(_ALL, _slots, transform=Hadamard(32, "fresh")),
        AMD_PAPER,
    )

for _name, _words, _slots in (
    ("sr", "all six operands", SLOTS),
    ("sr-fprop", "both operands of fprop", FPROP),
    ("sr-backward", "the four operands of the backward pass", BACKWARD),
    ("sr-g", "gradients", GRADIENTS),
    ("sr-g-dgrad", "dgrad's gradient", ("g_dgrad",)),
    ("sr-g-wgrad", "wgrad's gradient", ("g_wgrad",)),
):
    _variant(
        f"mxfp4-ceil-{_name}",
        f"as mxfp4-ceil, {_words} rounded stochastically",
        _changed(_ALL, _slots, rounding=Rounding.STOCHASTIC),
        TSENG_PAPER,
    )

_FQT = NVFP4_FQT.rules[-1].spec or LayerSpec()
for _name, _words, _phase, _source in (
    ("forward-end", "the forward pass", Phase(0.8, ("fprop",)), NVIDIA_PAPER),
    ("backward-end", "the backward pass", Phase(0.8, ("dgrad", "wgrad")), FQT_PAPER),
    ("backward-half", "the backward pass", Phase(0.5, ("dgrad", "wgrad")), FQT_PAPER),
    ("high-end", "everything", Phase(0.8, ("fprop", "dgrad", "wgrad")), NVIDIA_PAPER),
):
    _share = "half" if _phase.start == 0.5 else "fifth"
    _variant(
        f"nvfp4-fqt-{_name}",
        f"as nvfp4-fqt, with {_words} in the model's precision for the last {_share} of the steps",
        _FQT,
        _source,
        (_phase,),
    )

_ROTATED = UFP4.rules[-1].spec or LayerSpec()
_variant("ufp4-e2m1", "as ufp4, with E2M1's grid", _changed(_ROTATED, SLOTS, format=f.FP4_E2M1), UFP4_PAPER)
_variant("ufp4-plain", "as ufp4, without rotations", _changed(_ROTATED, SLOTS, transform=None), UFP4_PAPER)
_variant(
    "ufp4-e2m1-plain",
    "as ufp4, with E2M1's grid and without rotations",
    _changed(_ROTATED, SLOTS, format=f.FP4_E2M1, transform=None),
    UFP4_PAPER,
)

for _size, _scale, _spec in (
    (16, "e8m0", replace(_BASE, granularity=Block(16))),
    (64, "e8m0", replace(_BASE, granularity=Block(64))),
    (32, "e4m3", replace(NVFP4, granularity=Block(32))),
    (64, "e4m3", replace(NVFP4, granularity=Block(64))),
):
    _variant(
        f"e2m1-block{_size}-{_scale}",
        f"E2M1 in blocks of {_size} with {_scale.upper()} scales, gradients stochastic",
        _changed(everywhere(_spec), GRADIENTS, rounding=Rounding.STOCHASTIC),
        FQT_PAPER,
    )
