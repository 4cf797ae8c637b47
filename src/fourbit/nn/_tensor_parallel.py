"""Linear layers whose weights lie in several processes (`torch.distributed.tensor.parallel`).

    ColwiseParallel    each process has output features of w, so columns of y and g: dx is a sum over the processes
    RowwiseParallel    each process has input features of w and x: y is a sum over the processes

Scales of the tensor, and of tiles that lie in several processes, are those of the whole, and every element gets the random
word that it has in the whole. So the numbers are those of one process, up to the order of sums. What has a number of its own
that the parts would have to agree on (a clip value, an exponent), or rounds a result of which a process has but a summand, is
refused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fourbit.errors import UserError
from fourbit.ops import SLOTS, Contraction, LayerSpec, LayerState, contract
from fourbit.quantizers import Share, Sharing, is_shard

_COLWISE = {"w_fprop": (0, 1), "w_dgrad": (0, 3), "g_dgrad": (-1, 3), "g_wgrad": (-1, 1)}
_ROWWISE = {"x_fprop": (-1, 3), "x_wgrad": (-1, 1), "w_fprop": (1, 3), "w_dgrad": (1, 1)}


def parallel_linear(x: Any, w: Any, bias: Any, contraction: Contraction, state: LayerState) -> Tensor:
    """y = x w^T + b of DTensors on a mesh of one dimension, a DTensor as torch's linear gives it.

    Raises:
        UserError: a weight that is not divided by features, an input that is no DTensor, a spec that needs more than the parts.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    by = w.placements[0] if w.device_mesh.ndim == 1 else None
    if by not in (Shard(0), Shard(1)) or not isinstance(x, DTensor):
        raise UserError(
            "the weight of a quantized layer is a DTensor, of which this process has a part: call the module that fully_shard "
            "was applied to, which gathers it, or divide the layer as ColwiseParallel or RowwiseParallel do"
        )
    columns, mesh = by == Shard(0), w.device_mesh
    if state.sharing is None or not state.sharing.in_evaluation:
        _join(state, _COLWISE if columns else _ROWWISE, contraction, w)
    last = Shard(x.dim() - 1)
    x = x.redistribute(placements=[Replicate() if columns else last])
    x_part = x.to_local(grad_placements=[Partial() if columns else last])
    y = contract(x_part, w.to_local(), contraction, state)
    if columns:
        y = y if bias is None else y + bias.to_local().to(y.dtype)
        return DTensor.from_local(y, mesh, [Shard(y.dim() - 1)])
    whole = DTensor.from_local(y, mesh, [Partial()])
    return whole if bias is None else whole.redistribute(placements=[Replicate()]) + bias.to(y.dtype)


def _join(state: LayerState, axes: dict[str, tuple[int, int]], contraction: Contraction, w: Any) -> None:
    """Scales are those of the whole from now on."""
    objection = _objection(state, axes, contraction, w)
    if objection:
        raise UserError(
            f"a layer of this recipe cannot be divided by parallelize_module: it {objection}. Leave its layer out of the plan, "
            "or take a recipe without, such as nvfp4 or mxfp4"
        )
    for name, t in state._buffers.items():  # parallelize_module makes DTensors of them, the same in all processes
        if t is not None and is_shard(t):
            state._buffers[name] = t.to_local()  # type: ignore[attr-defined]
    state.sharing = Sharing(Share(w.device_mesh.get_group()), axes, in_evaluation=True)


def _objection(state: LayerState, axes: dict[str, tuple[int, int]], contraction: Contraction, w: Any) -> str:
    """Why the processes' parts do not make up the whole; "" where they do."""
    spec: LayerSpec = state.spec
    if state.sharing is not None:
        return "shares its batch, too"
    if state.scalings or state._modules:
        return "remembers numbers that belong to the whole layer"
    if spec.output is not None or spec.accumulation is not None:
        return "rounds sums of which each process has a part"
    if spec.compensates:
        return "restores what rounding has lost of a gradient"
    if any(n % w.device_mesh.size() for n in w.shape):
        return f"has a weight {tuple(w.shape)}, which {w.device_mesh.size()} processes do not divide"
    part = w.to_local()
    for slot in SLOTS:
        operand = spec.resolved(slot)
        if operand is None:
            continue
        if operand.outliers is not None or operand.leverage is not None or operand.estimator is not None:
            return f"looks at all of {slot[0]} for its quantiles, leverage or estimator"
        if slot not in axes:
            continue
        axis = axes[slot][1]
        size = part.shape[0] if axes is _COLWISE else part.shape[1]
        tile, transform = spec.tile(slot), spec.transform(slot)
        extent = {1: tile.rows, 3: tile.sums}[axis]
        scaling = operand.scaling
        units = [extent or 1, getattr(scaling, "outer", 0) or 1, getattr(scaling, "corrected", 0) or 1]
        units += [transform.size] if transform is not None and axis == 3 else []
        for unit in units:
            if size % unit:
                return f"has {size} features of {slot[0]} in each process, which blocks of {unit} do not divide"
    return ""
