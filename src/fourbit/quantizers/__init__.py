"""From a tensor to numbers of a format and back: rounding rules, scales, random words."""

from fourbit.quantizers._round import WORD_BITS as WORD_BITS
from fourbit.quantizers._round import Rounding as Rounding
from fourbit.quantizers._round import round_to_format as round_to_format
from fourbit.quantizers._scaling import TINY as TINY
from fourbit.quantizers._scaling import UNSET as UNSET
from fourbit.quantizers._scaling import Amax as Amax
from fourbit.quantizers._scaling import ClipValue as ClipValue
from fourbit.quantizers._scaling import FixedScale as FixedScale
from fourbit.quantizers._scaling import GradScale as GradScale
from fourbit.quantizers._scaling import LossScaled as LossScaled
from fourbit.quantizers._scaling import Sawb as Sawb
from fourbit.quantizers._scaling import Scaling as Scaling
from fourbit.quantizers._scaling import amax_of as amax_of
from fourbit.quantizers._scaling import best_clip_value as best_clip_value
from fourbit.quantizers._scaling import exponent_scale as exponent_scale
from fourbit.quantizers._spec import QTensor as QTensor
from fourbit.quantizers._spec import QuantSpec as QuantSpec
from fourbit.quantizers._spec import quantize as quantize
from fourbit.quantizers._words import mix64 as mix64
from fourbit.quantizers._words import random_words as random_words
from fourbit.quantizers._words import stream_key as stream_key
