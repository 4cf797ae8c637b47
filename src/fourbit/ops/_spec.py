"""`LayerSpec`: what happens to the six operands of a layer's three matrix products.

    fprop   y  = x_fprop * w_fprop
    dgrad   dx = g_dgrad * w_dgrad
    wgrad   dw = g_wgrad * x_wgrad

Each slot is a QuantSpec, None (full precision), or REUSE: the numbers that an earlier GEMM used, codes and scale.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

from fourbit.errors import UserError
from fourbit.formats import Format, get
from fourbit.ops._accumulation import Accumulation
from fourbit.quantizers import Hadamard, QuantSpec, Tile, tile_of


class Reuse(Enum):
    """The type of REUSE."""

    REUSE = "reuse"

    def __str__(self) -> str:
        return "reuse"


REUSE = Reuse.REUSE
"""w_dgrad: as in fprop. x_wgrad: as in fprop. g_wgrad: as in dgrad."""

SLOTS = ("x_fprop", "w_fprop", "g_dgrad", "w_dgrad", "g_wgrad", "x_wgrad")
"""Names of the six operand slots."""

_REUSED_FROM = {"w_dgrad": "w_fprop", "x_wgrad": "x_fprop", "g_wgrad": "g_dgrad"}

OPERANDS = {"fprop": ("x_fprop", "w_fprop"), "dgrad": ("g_dgrad", "w_dgrad"), "wgrad": ("g_wgrad", "x_wgrad")}
"""The slots that meet in a product."""

_CHANNELS_SUMMED = ("x_fprop", "g_dgrad", "w_dgrad")
"""Where the channels (of x those of the input, else of the output) lie along the summed axis."""


@dataclass(frozen=True)
class LayerSpec:
    """The six slots and the format of the results.

    Args:
        x_fprop, w_fprop, g_dgrad, w_dgrad, g_wgrad, x_wgrad: QuantSpec, None or (the last three) REUSE.
        output: format to which the results of the three GEMMs are rounded, before the scale of g is taken out; None
            leaves them in the float32 in which they are summed.
        accumulation: how each addition of the three GEMMs is rounded; None sums in float32 or exactly.

    Raises:
        UserError: a combination that no hardware could run or that contradicts itself; the message says what to write.
    """

    x_fprop: QuantSpec | None = None
    w_fprop: QuantSpec | None = None
    g_dgrad: QuantSpec | None = None
    w_dgrad: QuantSpec | Reuse | None = REUSE
    g_wgrad: QuantSpec | Reuse | None = None
    x_wgrad: QuantSpec | Reuse | None = REUSE
    output: Format | None = None
    accumulation: Accumulation | None = None

    def __post_init__(self) -> None:
        if self.output is not None:
            object.__setattr__(self, "output", get(self.output))
        if not (self.accumulation is None or isinstance(self.accumulation, Accumulation)):
            raise UserError(f"accumulation must be an Accumulation or None, not {self.accumulation!r}")
        for slot in SLOTS:
            value = getattr(self, slot)
            if value is REUSE and slot not in _REUSED_FROM:
                raise UserError(f"{slot} comes first and has nothing to reuse: give it a QuantSpec or None")
            if not (value is None or isinstance(value, (QuantSpec, Reuse))):
                raise UserError(f"{slot} must be a QuantSpec, REUSE or None, not {value!r}")
        self._check_tiles()
        self._check_transforms()
        self._check_scalings()

    def _check_tiles(self) -> None:
        for slot in ("x_fprop", "w_dgrad"):
            spec = getattr(self, slot)
            if isinstance(spec, QuantSpec) and spec.granularity == "channel":
                raise UserError(
                    f"{slot}: the product sums over these channels, and no scale per channel can be taken out of it: "
                    "write granularity='row' or 'tensor'"
                )
        for slot, origin in _REUSED_FROM.items():
            spec = getattr(self, origin)
            which = slot.partition("_")[2]
            in_full_precision = any(self.resolved(other) is None for other in OPERANDS[which])
            if getattr(self, slot) is not REUSE or not isinstance(spec, QuantSpec) or in_full_precision:
                continue
            tile = self.tile(origin)
            if tile != tile.T and tile.T.sums is not None:
                raise UserError(
                    f"{slot}=REUSE needs a scale that is constant along the axis that {which} sums over, or "
                    f"square tiles, but {origin} has one per {spec.granularity}: write {slot}=QuantSpec(...) of its own, or "
                    "give both granularity='tensor'"
                )

    def _check_transforms(self) -> None:
        for which, slots in OPERANDS.items():
            transforms = [self.transform(slot) for slot in slots]
            if transforms[0] != transforms[1]:
                first, second = (f"{slot} has {t or 'none'}" for slot, t in zip(slots, transforms, strict=True))
                raise UserError(
                    f"both operands of {which} are rotated alike, but {first} and {second}: give both the same transform (an "
                    "operand in full precision and one that is reused have none)"
                )
        for slot in SLOTS:
            spec = getattr(self, slot)
            if not isinstance(spec, QuantSpec):
                continue
            if spec.estimator is not None and slot != "w_fprop":
                raise UserError(f"{slot}: an estimator is for the gradient of the weight: give it to w_fprop")
            if spec.outliers is not None:
                self._check_outliers(slot)
            if spec.leverage is not None and not slot.startswith("g_"):
                raise UserError(f"{slot}: leverage is for gradients; leave it out here")
            if spec.source == "exact":
                continue
            if slot not in ("w_dgrad", "x_wgrad"):
                raise UserError(f"{slot}: source='fprop' is for w_dgrad and x_wgrad, which come after fprop")
            if self.resolved(_REUSED_FROM[slot]) is None:
                raise UserError(f"{slot}: source='fprop' needs {_REUSED_FROM[slot]} to be quantized")

    def _check_outliers(self, slot: str) -> None:
        if slot != "x_fprop":
            raise UserError(f"{slot}: outliers are those of x_fprop; leave them out here")
        if self.x_wgrad is REUSE or (isinstance(self.x_wgrad, QuantSpec) and self.x_wgrad.source == "fprop"):
            raise UserError("x_wgrad: fprop has x without its outliers: write x_wgrad=None, or a QuantSpec of its own")
        if self.output is not None or self.accumulation is not None:
            raise UserError("x_fprop: outliers add a product in high precision: leave output and accumulation out")

    def tile(self, slot: str) -> Tile:
        """Who shares a scale in a slot, in the orientation of its own product (with REUSE: of the one that it comes from)."""
        return self._tiles[slot]

    @cached_property
    def _tiles(self) -> dict[str, Tile]:
        found = {}
        for slot in SLOTS:
            spec, origin = self.resolved(slot), _REUSED_FROM[slot] if getattr(self, slot) is REUSE else slot
            whole = Tile(None, None)
            found[slot] = whole if spec is None else tile_of(spec.granularity, origin not in _CHANNELS_SUMMED)
        return found

    def transform(self, slot: str) -> Hadamard | None:
        """How a slot is rotated along the axis that its own product sums over."""
        spec = getattr(self, slot)
        return spec.transform if isinstance(spec, QuantSpec) else None

    def rotated_result(self, which: str) -> Hadamard | None:
        """The rotation that dx (dgrad) or dw (wgrad) comes out with, because w or x is as fprop had it."""
        slot = "w_dgrad" if which == "dgrad" else "x_wgrad"
        value = getattr(self, slot)
        from_fprop = value is REUSE or (isinstance(value, QuantSpec) and value.source == "fprop")
        return self.transform(_REUSED_FROM[slot]) if from_fprop else None

    def _check_scalings(self) -> None:
        for slot in SLOTS:
            spec = self.resolved(slot)
            if spec is None:
                continue
            if spec.compensate and not slot.startswith("g_"):
                raise UserError(f"{slot}: compensate={spec.compensate!r} is for gradients; leave it out here")
            if slot[0] not in spec.scaling.operands:
                right = "gradients" if spec.scaling.operands == "g" else "x_fprop and w_fprop"
                instead = "GradScale or Amax" if slot.startswith("g_") else "ClipValue, Sawb or Amax"
                raise UserError(f"{slot}: {spec.scaling} is for {right}; use {instead} here")
            if slot in ("w_dgrad", "x_wgrad") and spec.scaling.state_class and getattr(self, slot) is not REUSE:
                raise UserError(f"{slot}: what {spec.scaling} remembers is that of fprop; write {slot}=REUSE")
        g_d, g_w = self.resolved("g_dgrad"), self.resolved("g_wgrad")
        if g_d and g_w:
            stored = [(s.scaling, s.granularity) for s in (g_d, g_w) if s.scaling.state_class]
            if len(set(stored)) > 1:
                raise UserError(
                    f"g_dgrad ({g_d}) and g_wgrad ({g_w}) share one scale per layer: give both the same scaling and granularity"
                )

    def raised(self, slots: Iterable[str]) -> LayerSpec:
        """The same with some slots in full precision. What reused one of them and is not raised itself is quantized by its
        spec as before.

        Raises:
            UserError: a slot that is left would need what is gone: a clip value, or what fprop had.
        """
        gone = set(slots)
        changed: dict[str, QuantSpec | Reuse | None] = dict.fromkeys(gone, None)
        for slot, origin in _REUSED_FROM.items():
            value = getattr(self, slot)
            if slot in gone or origin not in gone:
                continue
            if value is REUSE:
                spec = self.resolved(origin)
                changed[slot] = None if spec is None else replace(spec, transform=None)  # that was along another axis
            elif isinstance(value, QuantSpec) and value.source == "fprop":
                changed[slot] = replace(value, source="exact")
        return replace(self, **changed)  # type: ignore[arg-type]

    def resolved(self, slot: str) -> QuantSpec | None:
        """The QuantSpec that applies in `slot`, REUSE followed to its origin."""
        return self._resolved[slot]

    @cached_property
    def _resolved(self) -> dict[str, QuantSpec | None]:
        values = {slot: getattr(self, slot) for slot in SLOTS}
        return {slot: values[_REUSED_FROM[slot]] if value is REUSE else value for slot, value in values.items()}

    @cached_property
    def compensates(self) -> bool:
        """Whether the products of a gradient get back what its rounding has lost."""
        return any(spec is not None and spec.compensate != "" for spec in map(self.resolved, ("g_dgrad", "g_wgrad")))

    @cached_property
    def g_scaling(self) -> QuantSpec | None:
        """The gradient slot whose scaling keeps state (GradScale, LossScaled), if any."""
        for slot in ("g_dgrad", "g_wgrad"):
            spec = self.resolved(slot)
            if spec is not None and spec.scaling.state_class:
                return spec
        return None

    def remembering(self) -> dict[str, QuantSpec]:
        """The operands, "x", "w" and "g", whose scaling remembers something, and how they are quantized."""
        found = {"x": self.x_fprop, "w": self.w_fprop, "g": self.g_scaling}
        return {name: spec for name, spec in found.items() if spec is not None and spec.scaling.state_class}

    @property
    def needs_loss_scale(self) -> bool:
        """Whether the gradients rely on a `LossScaler`."""
        return self.g_scaling is not None and self.g_scaling.scaling.needs_loss_scale

    @cached_property
    def stochastic(self) -> bool:
        """Whether any slot, or the accumulation, draws random words."""
        if self.accumulation is not None and self.accumulation.stochastic:
            return True
        return any(spec.stochastic for spec in map(self.resolved, SLOTS) if spec)

    @property
    def is_identity(self) -> bool:
        """Whether nothing is quantized: the layer then runs torch's own code."""
        return self.output is None and self.accumulation is None and all(self.resolved(slot) is None for slot in SLOTS)
