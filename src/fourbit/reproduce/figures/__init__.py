"""The paper's figures and the questions that they leave open, each as one function that measures, draws and writes.

    draw("fig6", scale="small", data_dir=Path("data/cifar10"))

An experiment that needs trained networks trains them first, in the folder that all figures of a scale share, and goes on
where it was when it is called again. To add one, register a function (see `_base`).
"""

from fourbit.reproduce.figures import _bias as _bias
from fourbit.reproduce.figures import _formats as _formats
from fourbit.reproduce.figures import _gradients as _gradients
from fourbit.reproduce.figures import _gradscale as _gradscale
from fourbit.reproduce.figures import _macs as _macs
from fourbit.reproduce.figures import _statistics as _statistics
from fourbit.reproduce.figures._base import FIGURES as FIGURES
from fourbit.reproduce.figures._base import PAPER as PAPER
from fourbit.reproduce.figures._base import Drawn as Drawn
from fourbit.reproduce.figures._base import Studio as Studio
from fourbit.reproduce.figures._base import draw as draw
from fourbit.reproduce.figures._base import title as title
