"""`fourbit`, `python -m fourbit`, and `torchrun --nproc-per-node 2 -m fourbit train ...` for several processes."""

import sys

from fourbit._interrupt import leave_at_once


def run() -> None:
    """The program."""
    leave_at_once()
    from fourbit.cli import main

    sys.exit(main())


if __name__ == "__main__":
    run()
