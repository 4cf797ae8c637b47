"""Number formats as data, in pure Python: codes, grids, decision points, and the rounding that defines all others.

>>> from fourbit import formats
>>> formats.get("fp4_e2m1").max
6.0
"""

from fourbit.formats._base import Codebook as Codebook
from fourbit.formats._base import Format as Format
from fourbit.formats._base import IntFormat as IntFormat
from fourbit.formats._blocks import BlockFormat as BlockFormat
from fourbit.formats._blocks import Blocks as Blocks
from fourbit.formats._float import FloatFormat as FloatFormat
from fourbit.formats._float import midpoint_multiplier as midpoint_multiplier
from fourbit.formats.catalog import BFLOAT16 as BFLOAT16
from fourbit.formats.catalog import BINARY16 as BINARY16
from fourbit.formats.catalog import BLOCKS as BLOCKS
from fourbit.formats.catalog import CATALOG as CATALOG
from fourbit.formats.catalog import E8M0 as E8M0
from fourbit.formats.catalog import FP4_121 as FP4_121
from fourbit.formats.catalog import FP4_E1M2 as FP4_E1M2
from fourbit.formats.catalog import FP4_E2M1 as FP4_E2M1
from fourbit.formats.catalog import FP4_R2 as FP4_R2
from fourbit.formats.catalog import FP4_R2_5 as FP4_R2_5
from fourbit.formats.catalog import FP4_R2_139 as FP4_R2_139
from fourbit.formats.catalog import FP4_R4_EVEN as FP4_R4_EVEN
from fourbit.formats.catalog import FP4_R4_EVEN_185 as FP4_R4_EVEN_185
from fourbit.formats.catalog import FP4_R4_ODD as FP4_R4_ODD
from fourbit.formats.catalog import FP4_R4_ODD_185 as FP4_R4_ODD_185
from fourbit.formats.catalog import FP4_R8 as FP4_R8
from fourbit.formats.catalog import FP4_R16 as FP4_R16
from fourbit.formats.catalog import FP5_R2 as FP5_R2
from fourbit.formats.catalog import FP6_E2M3 as FP6_E2M3
from fourbit.formats.catalog import FP6_E3M2 as FP6_E3M2
from fourbit.formats.catalog import FP8_143 as FP8_143
from fourbit.formats.catalog import FP8_152 as FP8_152
from fourbit.formats.catalog import FP8_E3M4 as FP8_E3M4
from fourbit.formats.catalog import FP8_E4M3FN as FP8_E4M3FN
from fourbit.formats.catalog import FP8_E5M2 as FP8_E5M2
from fourbit.formats.catalog import FP16_169 as FP16_169
from fourbit.formats.catalog import HIF4 as HIF4
from fourbit.formats.catalog import INT2 as INT2
from fourbit.formats.catalog import INT2_MIDRISE as INT2_MIDRISE
from fourbit.formats.catalog import INT2_SYM as INT2_SYM
from fourbit.formats.catalog import INT3 as INT3
from fourbit.formats.catalog import INT3_MIDRISE as INT3_MIDRISE
from fourbit.formats.catalog import INT3_SYM as INT3_SYM
from fourbit.formats.catalog import INT4 as INT4
from fourbit.formats.catalog import INT4_MIDRISE as INT4_MIDRISE
from fourbit.formats.catalog import INT4_PAIR as INT4_PAIR
from fourbit.formats.catalog import INT4_SYM as INT4_SYM
from fourbit.formats.catalog import INT8 as INT8
from fourbit.formats.catalog import INT8_SYM as INT8_SYM
from fourbit.formats.catalog import MXFP4 as MXFP4
from fourbit.formats.catalog import MXFP4_CEIL as MXFP4_CEIL
from fourbit.formats.catalog import MXFP6_E2M3 as MXFP6_E2M3
from fourbit.formats.catalog import MXFP6_E3M2 as MXFP6_E3M2
from fourbit.formats.catalog import MXFP8_E4M3 as MXFP8_E4M3
from fourbit.formats.catalog import MXFP8_E5M2 as MXFP8_E5M2
from fourbit.formats.catalog import MXINT4 as MXINT4
from fourbit.formats.catalog import NVFP4 as NVFP4
from fourbit.formats.catalog import NVFP4_4OVER6 as NVFP4_4OVER6
from fourbit.formats.catalog import NVFP4_ONE_LEVEL as NVFP4_ONE_LEVEL
from fourbit.formats.catalog import S1P2 as S1P2
from fourbit.formats.catalog import UE5M3 as UE5M3
from fourbit.formats.catalog import UE6M2 as UE6M2
from fourbit.formats.catalog import UINT4 as UINT4
from fourbit.formats.catalog import UINT8 as UINT8
from fourbit.formats.catalog import get as get
from fourbit.formats.catalog import get_block as get_block
from fourbit.formats.catalog import names as names
