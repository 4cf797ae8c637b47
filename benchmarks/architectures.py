"""The table of docs/architectures.md: small networks of many architectures, before and after `convert`.

    python -m benchmarks.architectures [NAME ...] [--out FILE]

With names, it prints the table of those alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import fourbit as fb
from benchmarks import _architecture_checks as checks
from benchmarks._architecture_checks import STEPS, Coverage
from benchmarks._architectures import BATCH, CASES, Case
from fourbit.errors import UserError

HEAD = (
    "architecture",
    "weights",
    "layers",
    "4 x 4",
    "not converted",
    "float",
    "4 bits",
    "restored",
    "saved",
    "generates",
)

TEXT = """# Architectures

Small networks of `transformers`, built from a configuration with random weights, converted by `ibm2020`, and trained for
{steps} steps of AdamW to know one batch of {batch} examples by heart; without dropout, and each at one learning rate in
float and in 4 bits. `python -m benchmarks.architectures` writes this page, and `tests/models/test_architectures.py` goes
through the same checks.

- **layers**: products that `convert` has quantized. **not converted**: layers that multiply matrices and stay in full
  precision, as `explain` names them.
- **4 x 4**: of the multiply-accumulates of these layers in a training step, those whose operands both have 4 bits. The rest
  is the first and the last layer, in FP16 as the recipe has it (the first "layer" of a language model is its embedding, so
  only its last one counts), and depthwise convolutions. In networks as small as these the last layer weighs more than in
  large ones.
- **float**, **4 bits**: the loss before training, and after.
- **restored**: after `restore`, classes, state_dict and outputs are bit for bit those of a network in full precision with
  these weights. **saved**: `save_pretrained` and `from_pretrained` give the weights back. **generates**: `generate` writes
  tokens while the network is converted.

{versions}.

{table}
"""


def run(case: Case) -> tuple[str, ...]:
    """The row of one architecture."""
    plain = case.build()
    num_weights = sum(p.numel() for p in plain.parameters())
    losses = [checks.train(plain, case)]
    try:
        found = checks.coverage(case)
    except UserError as error:
        return case.name, f"{num_weights:,}", "0", "-", str(error), *["-"] * (len(HEAD) - 5)
    model: Any = fb.convert(case.build(), "ibm2020")
    losses.append(checks.train(model, case))
    faults_of = [
        checks.faults_of_saving(model),
        checks.faults_of_generating(model, case) if case.generates else None,
        checks.faults_of_restoring(model, case),
    ]
    saved, generates, restored = ("-" if faults is None else "; ".join(faults) or "yes" for faults in faults_of)
    falls = [f"{first:.2f} → {last:.2f}" for first, last in losses]
    share = f"{found.share:.0%}"
    return (
        case.name,
        f"{num_weights:,}",
        str(len(found.layers)),
        share,
        _others(found),
        *falls,
        restored,
        saved,
        generates,
    )


def _others(found: Coverage) -> str:
    kinds = Counter(note.split()[0] for note in found.other.values())
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "-"


def table(rows: list[tuple[str, ...]]) -> str:
    """In Markdown."""
    lines = [HEAD, tuple("---" for _ in HEAD), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures; all of them if none is named")
    parser.add_argument("--out", type=Path, default=Path("docs/architectures.md"), help="where all of them are written")
    options = parser.parse_args()
    unknown = set(options.names) - {case.name for case in CASES}
    if unknown:
        parser.error(f"no such architecture: {', '.join(sorted(unknown))}")
    import transformers

    transformers.logging.set_verbosity_error()
    rows = []
    for case in CASES:
        if options.names and case.name not in options.names:
            continue
        rows.append(run(case))
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    if options.names:
        print(table(rows))
        return
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, one CPU"
    options.out.write_text(TEXT.format(steps=STEPS, batch=BATCH, versions=versions, table=table(rows)))


if __name__ == "__main__":
    main()
