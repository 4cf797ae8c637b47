"""The ways to train a network that the benchmarks compare, by name; `prepare` makes a training step of one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fourbit as fb
from benchmarks import _naive, _peers
from benchmarks._harness import Entrant, Kind, Skip
from benchmarks._networks import Network
from fourbit import backends

Change = Callable[[nn.Module, Network], nn.Module]


def _nothing(model: nn.Module, network: Network) -> nn.Module:
    return model


def _recipe(name: str, fuse: bool = True) -> Change:
    def change(model: nn.Module, network: Network) -> nn.Module:
        try:
            return fb.convert(model, name, fuse=fuse)
        except fb.UserError as error:  # a rotation does not divide its layers
            raise Skip(str(error)) from error

    return change


def _four_bit_layers(change: Callable[[nn.Module, Sequence[str]], nn.Module]) -> Change:
    def checked(model: nn.Module, network: Network) -> nn.Module:
        names = four_bit_names(network)
        if any(isinstance(model.get_submodule(name), nn.RNNBase) for name in names):
            raise Skip("it has no recurrent layers")
        return change(model, names)

    return checked


def _microxcaling(elements: str) -> Change:
    return _four_bit_layers(partial(_peers.to_microxcaling, elements))


@dataclass(frozen=True)
class Way:
    """How a network is trained.

    Args:
        change: makes of a network in full precision what is trained.
        channels_last: whether images and convolutions lie that way; a network without images has no such way.
        only_images: whether to leave it out where there are no images.
        kernels: False runs this library's reference.
    """

    name: str
    kind: Kind
    change: Change = _nothing
    channels_last: bool = True
    only_images: bool = False
    autocast: bool = False
    compiled: bool = False
    kernels: bool = True


WAYS = {
    way.name: way
    for way in (
        Way("fp32", "baseline", channels_last=False),
        Way("fp32 channels_last", "baseline", only_images=True),
        Way("bf16 autocast", "baseline", autocast=True),
        Way("ours ibm2020", "ours", _recipe("ibm2020")),
        Way("ours ibm2020, bf16 autocast", "ours", _recipe("ibm2020"), autocast=True),
        Way("ours luq", "ours", _recipe("luq")),
        Way("ours int4-fwd", "ours", _recipe("int4-fwd")),
        Way("ours nvfp4", "ours", _recipe("nvfp4")),
        Way("ours mxfp4-rht-sr", "ours", _recipe("mxfp4-rht-sr")),
        Way("ours ibm2020, not fused", "ours", _recipe("ibm2020", fuse=False)),
        Way("ours ibm2020, no kernels", "reference", _recipe("ibm2020"), kernels=False),
        Way("naive fake-quant", "naive", _four_bit_layers(_naive.convert)),
        Way("fp32 compiled", "compiled", compiled=True),
        Way("bf16 compiled", "compiled", autocast=True, compiled=True),
        Way("ours ibm2020 compiled", "compiled", _recipe("ibm2020"), compiled=True),
        Way("QPyTorch", "peer", _four_bit_layers(_peers.to_qpytorch), channels_last=False),
        Way("microxcaling MXFP4", "peer", _microxcaling("fp4_e2m1"), channels_last=False),
        Way("microxcaling INT4", "peer", _microxcaling("int4"), channels_last=False),
        Way("fp4-trainkit", "peer", _four_bit_layers(_peers.to_fp4_trainkit), channels_last=False),
    )
}

MAIN = ("fp32", "fp32 channels_last", "bf16 autocast", "ours ibm2020", "naive fake-quant")
"""The ones that growth and memory are measured of where time is short."""


def base_of(network: Network) -> str:
    """The way that ratios are taken to."""
    return "fp32 channels_last" if network.images else "fp32"


def four_bit_names(network: Network) -> list[str]:
    """The layers that the recipes put in 4 bits: what LUQ quantizes at all. The parts of an LSTM count as the LSTM."""
    modules = dict(network.build().named_modules())
    names = fb.quantized_layers(fb.convert(network.build(), "luq"))
    return list(dict.fromkeys(name if name in modules else name.rpartition(".")[0] for name in names))


class Training:
    """A network in training: calling it makes one step of SGD on the same batch."""

    def __init__(self, way: Way, network: Network, batch: int):
        if way.only_images and not network.images:
            raise Skip("not a network of images")
        if way.compiled:
            _peers.require_compiler()
        torch.manual_seed(0)
        self.way = way
        self.model = way.change(network.build(), network)
        self.x, self.y = network.data(batch)
        if network.images and way.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.x = self.x.to(memory_format=torch.channels_last)
        self.run: Callable[[Tensor], Tensor] = torch.compile(self.model) if way.compiled else self.model
        self.optimizer = torch.optim.SGD(fb.param_groups(self.model, 1e-4), lr=0.01, momentum=0.9)

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """What surrounds a step."""
        return contextlib.nullcontext() if self.way.kernels else backends.without()

    def loss(self) -> Tensor:
        """Mean cross entropy.

        Raises:
            Skip: a layer refuses its input, as recurrent ones where a rotation does not divide their sums.
        """
        with torch.autocast("cpu", torch.bfloat16, enabled=self.way.autocast):
            try:
                logits = self.run(self.x)
            except fb.UserError as error:
                raise Skip(str(error)) from None
        return F.cross_entropy(logits.flatten(0, -2).float(), self.y.flatten())

    def __call__(self) -> None:
        with self.context():
            self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def prepare(way: str, network: Network, batch: int) -> Training:
    """A network ready to be trained in that way.

    Raises:
        Skip: the way does not exist for this network, or a library is missing.
    """
    return Training(WAYS[way], network, batch)


def entrants(network: Network, batch: int, ways: Sequence[str]) -> list[Entrant]:
    """Those of `ways` that exist for the network."""
    found = [WAYS[name] for name in ways if network.images or not WAYS[name].only_images]
    return [Entrant(w.name, w.kind, lambda w=w: Training(w, network, batch)) for w in found]


def names(compiled: bool) -> list[str]:
    """All ways, with or without those that compile."""
    return [w.name for w in WAYS.values() if compiled or not w.compiled]
