"""`fourbit conform`: hold a quantizer against the definition of its format."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from fourbit._files import problem, replace_file
from fourbit.cli._app import app
from fourbit.cli._terminal import make_table, say, show
from fourbit.errors import UserError
from fourbit.train._config import WHOLE

if TYPE_CHECKING:
    from fourbit.conform import Report


@app.command
def conform(
    name: str | None = None,
    *,
    format: str | None = None,
    rounding: Literal["nearest", "stochastic"] | None = None,
    linear: str | None = None,
    samples: Annotated[int | None, WHOLE] = None,
    out: Path | None = None,
) -> int:
    """Hold a quantizer against the definition of its block format; exit code 1 if a check fails.

    Args:
        name: A function, as module:function, that maps a float32 tensor [rows, K] to its quantized and dequantized numbers,
            blocks along K; or a quantizer of another library, as torchao:nvfp4. Without it, formats and libraries are listed.
        format: The block format (default: what the other library's quantizer claims).
        rounding: What the quantizer does (default: nearest). With stochastic, its randomness is tested; a parameter seed of the
            function gets another integer at every call.
        linear: A function, as module:function, that makes a linear layer with bias from (in_features, out_features); its output
            and gradients are compared with float64.
        samples: Roundings per check of stochastic rounding, about (default: 2097152).
        out: Write the report to this file, as JSON.
    """
    from fourbit.conform import PEERS, SAMPLES, check, load

    if name is None:
        if format or rounding or linear or samples or out:
            raise UserError(
                "there is nothing to check: name a function first, as in: fourbit conform mymodule:quantize."
            )
        return _list()
    if out is not None and not out.parent.is_dir():
        raise UserError(f"{out} cannot be written: there is no folder {out.parent}; create it, or write elsewhere.")
    versions: dict[str, str] = {}
    make_linear = None
    if name in PEERS:
        warnings.simplefilter("ignore")  # those of other libraries are not about what is found
        peer = PEERS[name]
        peer.require()
        quantizer, versions = peer.make(), peer.versions()
        format, rounding = format or peer.format, rounding or peer.rounding
        make_linear = peer.linear() if peer.linear and linear is None else None
    else:
        if name.partition(":")[0] in {each.partition(":")[0] for each in PEERS}:
            raise _unknown_peer(name)
        quantizer = load(name)
        if format is None:
            raise UserError(f"which format does {name} claim? Say --format NAME; fourbit conform lists the names.")
    if linear is not None:
        make_linear = load(linear)
    report = check(
        quantizer,
        format,
        rounding=rounding or "nearest",
        linear=make_linear,
        name=name,
        samples=SAMPLES if samples is None else samples,
        versions=versions,
    )
    _show(report)
    if out is not None:
        try:
            replace_file(out, (json.dumps(report.to_dict(), indent=1) + "\n").encode())
        except OSError as error:
            raise UserError(f"{out} could not be written: {problem(error, out)}.") from error
        say(f"report: {out}")
    return 0 if report.passed else 1


def _unknown_peer(name: str) -> UserError:
    from fourbit.conform import PEERS
    from fourbit.errors import unknown

    return unknown("quantizer", name, PEERS)


def _show(report: Report) -> None:
    """Print the table, and a line of what follows."""
    table = make_table("check", "result", "compared", "wrong", "detail")
    for result in report:
        numbers = (str(result.compared or "-"), str(result.wrong) if result.compared else "-")
        table.add_row(
            result.name, result.status.upper() if result.status == "fail" else result.status, *numbers, result.detail
        )
    show(table)
    failed = [result.name for result in report if result.status == "fail"]
    how = f", in {report.arithmetic}" if report.arithmetic else ""
    versions = ", ".join(f"{library} {version}" for library, version in report.versions.items())
    say(f"{report.quantizer} as {report.format}, rounding {report.rounding}{how} ({versions})")
    say(f"{len(failed)} of {len(report.results)} checks failed: {', '.join(failed)}" if failed else "no check failed")


def _list() -> int:
    """Print what there is to name."""
    from fourbit.cli._format_pages import list_block_formats
    from fourbit.conform import PEERS

    list_block_formats()
    table = make_table("other library", "format", "rounding", "to install")
    for peer in PEERS.values():
        table.add_row(peer.name, peer.format, peer.rounding, peer.how)
    show(table)
    return 0
