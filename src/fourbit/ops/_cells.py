"""What recurrent layers do between their products: the gates, and the cell state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fourbit.backends import Operation


class CellGradient(NamedTuple):
    """Gradients of one step: of the hidden state's share of the gates, of the cell state before it (None: there is none), and
    of the hidden state before it beside the product (None: 0)."""

    gates_h: Tensor
    c: Tensor | None
    h: Tensor | None


@dataclass(frozen=True)
class Cell:
    """What is between the products.

    Args:
        num_gates: rows of the weights per unit.
        forward: (gates_x [B, G H], gates_h [B, G H], h [B, H], c [B, H], kept [B, G H]) -> (h', c'); `kept` takes what
            backward needs of the gates.
        backward: (dh', dc', kept, gates_h, h, c, c', out [B, G H]) -> CellGradient; `out` takes the gradient of the input's
            share of the gates. Where the cell does not keep h, both shares have one gradient, and `gates_h` is `out`.
        keeps_h: whether backward needs gates_h and h; otherwise only the sum of both shares matters.
    """

    name: str
    num_gates: int
    forward: Callable[..., tuple[Tensor, Tensor | None]]
    backward: Callable[..., CellGradient]
    keeps_h: bool


LSTM_FORWARD: Operation[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = Operation(
    "lstm_forward", reference="ops._cells._lstm_forward"
)
"""gates_x, gates_h, c, kept to h', c'."""
LSTM_BACKWARD: Operation[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = Operation(
    "lstm_backward", reference="ops._cells._lstm_backward"
)
"""dh', dc', the activated gates, c, c', out to dc."""


def _lstm_forward(gates_x: Tensor, gates_h: Tensor, h: Tensor, c: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """c' = f c + i g, h' = o tanh(c'), with i, f, o = sigmoid and g = tanh of the gates, in torch's order i, f, g, o."""
    done = LSTM_FORWARD(gates_x, gates_h, c, kept)
    if done is not None:
        return done
    gates = torch.add(gates_x, gates_h, out=kept)
    size = c.shape[1]
    gates[:, : 2 * size].sigmoid_()
    gates[:, 2 * size : 3 * size].tanh_()
    gates[:, 3 * size :].sigmoid_()
    i, f, g, o = gates.chunk(4, 1)
    new = torch.addcmul(f * c, i, g)
    return o * new.tanh(), new


def _lstm_backward(
    dh: Tensor, dc: Tensor, gates: Tensor, gates_h: Tensor | None, h: Tensor | None, c: Tensor, new: Tensor, out: Tensor
) -> CellGradient:
    done = LSTM_BACKWARD(dh, dc, gates, c, new, out)
    if done is not None:
        return CellGradient(out, done, None)
    i, f, g, o = gates.chunk(4, 1)
    t = new.tanh()
    dc = torch.addcmul(dc, dh * o, 1 - t * t)
    torch.cat((dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g), dh * t * o * (1 - o)), 1, out=out)
    return CellGradient(out, dc * f, None)


def _gru_forward(gates_x: Tensor, gates_h: Tensor, h: Tensor, c: None, kept: Tensor) -> tuple[Tensor, None]:
    """h' = (1 - z) n + z h, with r, z = sigmoid(x + h), n = tanh(x + r h) of the gates, in torch's order r, z, n."""
    size = h.shape[1]
    r, z = torch.add(gates_x[:, : 2 * size], gates_h[:, : 2 * size], out=kept[:, : 2 * size]).sigmoid_().chunk(2, 1)
    n = torch.addcmul(gates_x[:, 2 * size :], r, gates_h[:, 2 * size :], out=kept[:, 2 * size :]).tanh_()
    return torch.lerp(n, h, z), None


def _gru_backward(
    dh: Tensor, dc: None, gates: Tensor, gates_h: Tensor, h: Tensor, c: None, new: None, out: Tensor
) -> CellGradient:
    r, z, n = gates.chunk(3, 1)
    dn = dh * (1 - z) * (1 - n * n)
    dz = dh * (h - n) * z * (1 - z)
    dr = dn * gates_h[:, 2 * h.shape[1] :] * r * (1 - r)
    torch.cat((dr, dz, dn), 1, out=out)
    return CellGradient(torch.cat((dr, dz, dn * r), 1), None, dh * z)


LSTM_CELL = Cell("LSTM", 4, _lstm_forward, _lstm_backward, keeps_h=False)
GRU_CELL = Cell("GRU", 3, _gru_forward, _gru_backward, keeps_h=True)
