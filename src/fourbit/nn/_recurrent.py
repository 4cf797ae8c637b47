"""LSTM and GRU in low precision: drop-in subclasses of torch's own, with both products of every step quantized.

Parts, by layer k and direction (torch's suffixes): `ih_lk` multiplies the inputs, `hh_lk` the hidden state, `hr_lk` projects
it (LSTM with proj_size). Gates, cell states and biases stay in float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fourbit.errors import UserError
from fourbit.nn._base import require_input, swaps, traced
from fourbit.nn._parts import Composed, PartInfo
from fourbit.ops import GRU_CELL, LSTM_CELL, LinearMap, ProductSize, Recurrence, as_written, recurrent

Hidden = tuple[Tensor, Tensor | None]


class _Recurrent(Composed, nn.RNNBase):
    """What both share."""

    def parts(self) -> dict[str, PartInfo]:
        """Input, hidden and projecting product of each layer and direction; the parts of a layer have one position.

        |h| <= 1 as a product of sigmoids and tangents, unless it is projected; dropout divides what it leaves.
        """
        found = {}
        hidden = None if self.proj_size else 1.0
        below = hidden and hidden / (1.0 - self.dropout) if self.dropout < 1 else None
        for layer in range(self.num_layers):
            for suffix in _suffixes(self, layer):
                gates = getattr(self, f"weight_ih_{suffix}").shape[0]
                found[f"ih_{suffix}"] = PartInfo(f"l{layer}", f"weight_ih_{suffix}", gates, below if layer else None)
                found[f"hh_{suffix}"] = PartInfo(f"l{layer}", f"weight_hh_{suffix}", gates, hidden)
                if self.proj_size:
                    found[f"hr_{suffix}"] = PartInfo(f"l{layer}", f"weight_hr_{suffix}", self.proj_size, 1.0)
        return found

    def sizes(self, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> list[tuple[str, ProductSize, bool]]:
        """All rows of the (packed) input at once for the inputs' weights, step by step for the others; the inputs of the first
        layer may need no gradient."""
        x = inputs[0] if inputs else named["input"]
        data = x.data if isinstance(x, PackedSequence) else x
        rows = data.shape[:-1].numel()
        if isinstance(x, PackedSequence):
            steps = Counter(x.batch_sizes.tolist())
        else:
            length = x.shape[1 if self.batch_first and x.dim() == 3 else 0]
            steps = Counter({rows // max(1, length): length})
        found = []
        for name, info in _Recurrent.parts(self).items():
            n, k = getattr(self, info.weight).shape
            needed = data.requires_grad or not name.startswith("ih_l0")
            products = {rows: 1} if name.startswith("ih") else steps
            sizes = [LinearMap().size((m, k), (n, k), (m, n)).repeated(count) for m, count in products.items()]
            found += [(name, size, needed) for size in sizes]
        return found

    def _quantized(self) -> bool:
        return any(not self.part(name).spec.is_identity for name in self.parts())

    @as_written
    def _run(
        self, x: Tensor, batch_sizes: list[int], h: Tensor, c: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """All layers on packed rows; h and c are [layers * directions, B, ...]."""
        cell = GRU_CELL if self.mode == "GRU" else LSTM_CELL
        last_h, last_c = [], []
        for layer in range(self.num_layers):
            outputs = []
            for suffix in _suffixes(self, layer):
                number = len(last_h)
                hr = self.part(f"hr_{suffix}").quant if self.proj_size else None
                ih, hh = self.part(f"ih_{suffix}").quant, self.part(f"hh_{suffix}").quant
                recurrence = Recurrence(cell, ih, hh, hr, batch_sizes, suffix.endswith("reverse"))
                names = [f"{kind}_{suffix}" for kind in ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh")]
                w_ih, w_hh, w_hr, b_ih, b_hh = (cast(Any, getattr(self, name, None)) for name in names)
                start = h[number], None if c is None else c[number]
                y, new_h, new_c = recurrent(x, *start, (w_ih, w_hh, w_hr), (b_ih, b_hh), recurrence)
                outputs.append(y)
                last_h.append(new_h)
                last_c.append(new_c)
            x = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
            if self.dropout and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        return x, torch.stack(last_h), None if c is None else torch.stack(cast("list[Tensor]", last_c))

    def _forward(self, input: Tensor | PackedSequence, start: Hidden | None) -> tuple[Tensor | PackedSequence, Hidden]:
        packed = isinstance(input, PackedSequence)
        data = input.data if isinstance(input, PackedSequence) else input
        require_input(data, self, -1, self.input_size, (2,) if packed else (2, 3))
        batched = packed or data.dim() == 3
        if isinstance(input, PackedSequence):
            sizes, rows = input.batch_sizes.tolist(), data
        else:
            x = data if batched else data.unsqueeze(1)
            x = x.transpose(0, 1) if self.batch_first and batched else x
            sizes, rows = [x.shape[1]] * x.shape[0], x.reshape(x.shape[:2].numel(), x.shape[-1])
        if not sizes:
            raise UserError(f"{type(self).__name__} got an input of shape {tuple(data.shape)}: there is no step in it")
        h, c = self._start(start, sizes[0], rows, batched)
        if isinstance(input, PackedSequence) and start is not None and input.sorted_indices is not None:
            h, c = _permuted((h, c), input.sorted_indices)  # the caller's order of sequences is not the packed one
        y, h, c = self._run(rows, sizes, h, c)  # type: ignore[call-arg]
        if isinstance(input, PackedSequence):
            output = input._replace(data=y)
            last = (h, c) if input.unsorted_indices is None else _permuted((h, c), input.unsorted_indices)
            return output, last
        y = y.view(len(sizes), sizes[0], y.shape[1])
        y = y.transpose(0, 1) if self.batch_first and batched else y
        if not batched:
            return y.squeeze(1), (h.squeeze(1), None if c is None else c.squeeze(1))
        return y, (h, c)

    def _start(self, start: Hidden | None, batch: int, rows: Tensor, batched: bool) -> Hidden:
        """First hidden and cell state; zeros where there are none."""
        layers = self.num_layers * (2 if self.bidirectional else 1)
        shapes = (layers, batch, self.proj_size or self.hidden_size), (layers, batch, self.hidden_size)
        if start is None:
            h, c = (rows.new_zeros(shape) for shape in shapes)
            return h, c if self.mode == "LSTM" else None
        names = ("hidden", "cell")
        for name, t, shape in zip(names, start, shapes, strict=True):
            expected = shape if batched else (shape[0], shape[2])
            if t is not None and tuple(t.shape) != expected:
                raise UserError(
                    f"{type(self).__name__} got a first {name} state of shape {tuple(t.shape)}, but needs {expected}"
                )
        h, c = start
        return (h, c) if batched else (h.unsqueeze(1), None if c is None else c.unsqueeze(1))


def _suffixes(rnn: nn.RNNBase, layer: int) -> list[str]:
    return [f"l{layer}", f"l{layer}_reverse"] if rnn.bidirectional else [f"l{layer}"]


def _permuted(states: Hidden, order: Tensor) -> Hidden:
    h, c = states
    return h.index_select(1, order), None if c is None else c.index_select(1, order)


@swaps(nn.LSTM)
class LSTM(_Recurrent, nn.LSTM):
    """torch.nn.LSTM with quantized products:

        i, f, g, o = Q(x) Q(w_ih)^T + b_ih + Q(h) Q(w_hh)^T + b_hh;  c' = sigmoid(f) c + sigmoid(i) tanh(g);
        h' = sigmoid(o) tanh(c')

    >>> from fourbit import LayerSpec, QuantSpec, Sawb
    >>> lstm = LSTM(8, 16, num_layers=2, spec=LayerSpec(w_fprop=QuantSpec("int4_sym", Sawb())))
    >>> y, (h, c) = lstm(torch.ones(5, 3, 8))
    >>> y.shape, h.shape
    (torch.Size([5, 3, 16]), torch.Size([2, 3, 16]))
    """

    def forward(self, input, hx=None):
        """[T, B, I] or [B, T, I] (batch_first), [T, I], or packed -> outputs and (h, c)."""
        if (node := traced(self, input, hx)) is not None:
            return node
        if not self._quantized():
            return super().forward(input, hx)
        return self._forward(input, hx)


@swaps(nn.GRU)
class GRU(_Recurrent, nn.GRU):
    """torch.nn.GRU with quantized products:

    r, z = sigmoid(Q(x) Q(w_ih)^T + b_ih + Q(h) Q(w_hh)^T + b_hh);  n = tanh(x_n + r h_n);  h' = (1 - z) n + z h
    """

    def forward(self, input, hx=None):
        """As `LSTM`, but the state is h alone."""
        if (node := traced(self, input, hx)) is not None:
            return node
        if not self._quantized():
            return super().forward(input, hx)
        output, (h, _) = self._forward(input, None if hx is None else (hx, None))
        return output, h
