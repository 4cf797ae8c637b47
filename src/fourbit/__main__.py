"""`python -m fourbit`, and `torchrun --nproc-per-node 2 -m fourbit train ...` for several processes."""

import sys

from fourbit.cli import main

sys.exit(main())
