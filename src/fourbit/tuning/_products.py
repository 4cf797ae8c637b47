"""What a recipe multiplies, in the terms of the hardware model."""

from __future__ import annotations

from fourbit.hardware import Product
from fourbit.quantizers import BlockScale
from fourbit.recipes import GEMMS, Explanation, LayerExplanation


def products_of(explanation: Explanation) -> list[Product]:
    """What a recipe's layers multiply, and what is multiplied outside them, in the terms of `fourbit.hardware`."""
    found: list[Product] = []
    for layer in (*explanation.layers, *explanation.calls):
        own_spec = layer.spec if isinstance(layer, LayerExplanation) else None
        specs = {slot: own_spec.resolved(slot) if own_spec else None for slots in GEMMS.values() for slot in slots}
        names = {slot: "full" if spec is None else spec.format.name for slot, spec in specs.items()}
        learned = bool(layer.weights)
        for s, needs_dgrad, needs_wgrad in layer.sizes or ():
            y, depthwise = s.count * s.m * s.n, s.count > 1 and s.n == 1
            shared = (
                s.w < s.count * s.n * s.k
            )  # the steps of a recurrent layer, whose wgrad is one product over all of them
            steps = (1, s.count) if shared else (s.count, 1)
            shapes = {
                "fprop": (s.count, s.m, s.n, s.k, s.x, s.w, y),
                "dgrad": (s.count, s.m, s.k, s.n, y, s.w, s.x),
                "wgrad": (steps[0], s.n, s.k, s.m * steps[1], y, s.x, s.w),
            }
            for gemm, slots in GEMMS.items():
                if not {"fprop": True, "dgrad": needs_dgrad, "wgrad": needs_wgrad}[gemm]:
                    continue
                own = [spec for slot in slots if (spec := specs[slot]) is not None]
                product = Product(
                    *(layer.name, gemm, *shapes[gemm][:4], *(names[slot] for slot in slots), *shapes[gemm][4:]),  # type: ignore[arg-type]
                    block=next((s.scaling.format.name for s in own if isinstance(s.scaling, BlockScale)), ""),
                    stochastic=any(spec.rounding.draws for spec in own),
                    power=any(spec.scaling.is_power_of_two for spec in own),
                    shared=shared and gemm != "wgrad",
                    depthwise=depthwise,
                    learned=learned,
                )
                found.append(product)
    return found
