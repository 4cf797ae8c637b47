"""Hold any quantizer against the exact definition of its block format: values, scales, randomness, gradients.

>>> from fourbit import conform
>>> conform.check(lambda x: x, "mxfp4").passed  # float32 is no 4-bit format
False
"""

from fourbit.conform._check import SAMPLES as SAMPLES
from fourbit.conform._check import check as check
from fourbit.conform._peers import PEERS as PEERS
from fourbit.conform._peers import Peer as Peer
from fourbit.conform._report import Report as Report
from fourbit.conform._report import Result as Result
from fourbit.conform._subject import load as load
