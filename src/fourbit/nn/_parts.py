"""Layers made of several products: each product is a part of its own, with a spec and a state.

`Part` holds the state of one product; the weights stay parameters of the whole layer, under torch's names. `Composed` is what
LSTM, GRU and MultiheadAttention share. The parts are children of the layer, so that `lstm.ih_l0` is a layer like any other to
observers, votes and reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from fourbit.nn._base import Quantized
from fourbit.ops import Contraction, LayerSpec, LinearMap, Matmul, Products, ProductSize


class PartInfo(NamedTuple):
    """One product of a layer, as it can be told from torch's attributes.

    Args:
        group: parts of one group have one position among the layers (selectors `first` and `last`).
        weight: name of the parameter; "" for a product of two activations.
        num_channels: outputs.
        bound: largest magnitude that the inputs can have, of either sign, where the layer's own formula limits them.
    """

    group: str
    weight: str
    num_channels: int
    bound: float | None = None

    def fitted(self, spec: LayerSpec) -> LayerSpec:
        """`spec` with PACT starting at the bound, in its signed form, if it leaves the first clip value open.

        Bounded inputs grow while a network learns: hidden states are near 0.1 at first. A clip value that fits the first
        batch would cut them off, and follows too slowly: by at most the learning rate a step under Adam.
        """
        if self.bound is None or spec.x_fprop is None:
            return spec
        return replace(spec, x_fprop=spec.x_fprop.starting_at(self.bound))


class Part(Quantized):
    """One product, y = Q(x) Q(w)^T, whose weight belongs to the layer around it."""

    def __init__(self, info: PartInfo, map: Contraction, num_weights: int):
        nn.Module.__init__(self)
        self._map, self._num_channels, self.num_weights = map, info.num_channels, num_weights

    @property
    def num_channels(self) -> int:
        """Outputs."""
        return self._num_channels

    def contraction(self) -> Contraction:
        """x w^T, or the product of two activations."""
        return self._map

    def extra_repr(self) -> str:
        """The operands."""
        return super().extra_repr().lstrip("; ")


class Composed(nn.Module):
    """Mixin of the layers made of parts. The constructors take torch's arguments, and by keyword:

    Args:
        spec: the six slots of every product with a weight; by default nothing is quantized.
        seed, index: coordinates of the random words; the parts take the indices from `index` on.
        products: how backends may multiply, "fast" or "exact".
    """

    def __init__(
        self,
        *args: Any,
        spec: LayerSpec | None = None,
        seed: int = 0,
        index: int = 0,
        products: Products = "fast",
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        for number, (name, info) in enumerate(self.parts().items()):
            self.attach(name, (spec if info.weight else None) or LayerSpec(), seed, index + number, products)

    def parts(self) -> dict[str, PartInfo]:
        """The products by name. It reads torch's attributes only, so that it can be asked of a layer that is not converted."""
        raise TypeError(f"{type(self).__name__} defines no parts")

    def sizes(self, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> list[tuple[str, ProductSize, bool]]:
        """The products of one forward call with these arguments: part, size, and whether dgrad is needed. Likewise."""
        raise TypeError(f"{type(self).__name__} defines no sizes of its products")

    def attach(self, name: str, spec: LayerSpec, seed: int = 0, index: int = 0, products: Products = "fast") -> None:
        """Give a part a spec and fresh state."""
        info = self.parts()[name]
        num_weights = self.part_weight(name).numel() if info.weight else 0
        part = Part(info, LinearMap() if info.weight else Matmul(), num_weights)
        part.train(self.training)
        part.attach(info.fitted(spec), seed, index, products)
        if not any(p.requires_grad for p in self._own_parameters(info)):
            part.quant.freeze()
        device = next((p.device for p in self.parameters()), None)
        self.add_module(name, part if device is None else part.to(device))

    def _own_parameters(self, info: PartInfo) -> list[Tensor]:
        """What decides whether a part is trained: its weight, or for a product of activations all parameters around it."""
        weight = getattr(self, info.weight, None) if info.weight else None
        return [weight] if isinstance(weight, Tensor) else list(self.parameters())

    def part_weight(self, name: str) -> Tensor:
        """The weight of a part, a view of a parameter. Likewise."""
        return getattr(self, self.parts()[name].weight)

    def detach_parts(self) -> None:
        """Take all parts away."""
        for name in self.parts():
            if name in self._modules:
                del self._modules[name]

    def part(self, name: str) -> Part:
        """One part."""
        part = self._modules[name]
        assert isinstance(part, Part)
        return part
