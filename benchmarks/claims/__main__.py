"""`python -m benchmarks.claims`: see the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import benchmarks.claims
from benchmarks._harness import ROOT
from benchmarks.claims._write import stale, write


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 if `--check` finds something to write."""
    parser = argparse.ArgumentParser(
        description=benchmarks.claims.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if anything would change")
    arguments = parser.parse_args(argv)
    changed = stale() if arguments.check else write()
    print("\n".join(str(path.relative_to(ROOT)) for path in changed) or "nothing to write")
    return int(arguments.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
