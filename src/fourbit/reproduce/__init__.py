"""The tables of Sun et al. (NeurIPS 2020), each row by one command.

    from fourbit.reproduce import reproduce

    reproduce("table1", "resnet18", scale="small", data_dir=Path("data/cifar10"))

`paper` and `questions` hold what the paper printed and what runs instead of it at each scale; a row is one `compare` over the
recipes of its columns. Importing this package does not import torch.
"""

from fourbit.reproduce._row import COLUMNS as COLUMNS
from fourbit.reproduce._row import TableRow as TableRow
from fourbit.reproduce._run import reproduce as reproduce
from fourbit.reproduce.catalog import ROWS as ROWS
from fourbit.reproduce.catalog import rows_of as rows_of
