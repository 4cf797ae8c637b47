"""`check` runs all checks on one quantizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from fourbit._version import __version__
from fourbit.conform import _linear, _nearest, _stochastic
from fourbit.conform._blocks import describe
from fourbit.conform._report import Report, Result
from fourbit.conform._subject import Refused, Subject
from fourbit.errors import UserError
from fourbit.formats import BlockFormat, get_block

SAMPLES = 2**21
LEAST_SAMPLES = 2**14


def check(
    quantizer: Callable[..., Any],
    format: str | BlockFormat,
    *,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    linear: Callable[..., Any] | None = None,
    name: str = "",
    samples: int = SAMPLES,
    versions: dict[str, str] | None = None,
) -> Report:
    """Hold a quantizer against the definition of a block format.

    Args:
        quantizer: maps a float32 tensor [rows, K] to its quantized and dequantized numbers, blocks along K. A parameter `seed`
            gets another integer at every call.
        format: a block format of the catalogue, by name, or one of your own.
        rounding: what the quantizer does; with "stochastic", its randomness is tested.
        linear: makes a layer from (in_features, out_features), with parameters `weight` and `bias`, whose output and gradients
            are compared with float64.
        name: what the report calls it.
        samples: roundings per check of stochastic rounding, about.
        versions: of other libraries, for the report.

    Returns:
        The report; `report.passed` says whether nothing failed.

    Raises:
        UserError: an unknown format, no function, a function that fails on ordinary numbers or returns something else than a
            floating-point tensor of the same shape.

    >>> from fourbit.formats import MXFP4
    >>> check(lambda x: torch.tensor(MXFP4.round(x.tolist())).view(x.shape), "mxfp4").passed
    True
    """
    format = get_block(format)
    if rounding not in ("nearest", "stochastic"):
        raise UserError(f"rounding must be 'nearest' or 'stochastic', not {rounding!r}.")
    if samples < LEAST_SAMPLES:
        raise UserError(f"samples is {samples}, but must be at least {LEAST_SAMPLES}.")
    if rounding == "stochastic" and len(format.targets) > 1:
        raise UserError(
            f"stochastic rounding is not defined for {format}, which chooses its scales by the rounding's error."
        )
    subject = Subject(quantizer, name or getattr(quantizer, "__name__", "quantizer"))
    subject.probe(4 * format.block)
    nearest = rounding == "nearest"
    if nearest:
        format = _nearest.best_variant(subject, format)
    results = [
        _nearest.run(each, function, _nearest.Case(subject, format))
        for each, function in _nearest.CHECKS.items()
        if (nearest or each in _nearest.ALWAYS) and (format.tensor_bound or each != "tensor scale")
    ]
    known = all(result.status == "pass" for result in results if result.name == "random")
    if not nearest:
        coins = _stochastic.Coins(_nearest.Case(subject, format), samples)
        results += [_guarded(each, function, coins) for each, function in _stochastic.CHECKS.items()]
    if linear is not None:
        results += _linear.run(linear)
    return Report(
        subject.name,
        format.name,
        rounding,
        describe(format) if nearest and known else "",
        {"fourbit": __version__, "torch": torch.__version__, **(versions or {})},
        tuple(results),
    )


def _guarded(name: str, function: _stochastic.Check, coins: _stochastic.Coins) -> Result:
    try:
        return function(coins)
    except Refused as error:
        return Result(name, "fail", f"raised {error}")
