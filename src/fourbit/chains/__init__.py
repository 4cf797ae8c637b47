"""Chains: batch normalization, residual, activation and the next layer's quantization, in as few passes as can be.

A convolution leaves its product unfinished, and returns a `Pending` tensor in its place. Torch's own modules and functions
are then called with it, in the order in which the model's `forward` calls them. Those that a chain knows become its next
step and return a `Pending` tensor again; whatever else meets one has it computed first, and finds a plain tensor.

    conv(x)       `begin`      the product is taken, its rounding is not
    batch_norm    `normalize`  statistics, and the running ones; what remains is an affine map per channel
    + residual    `add`
    relu, relu6   `activate`
    conv(...)     `take`       the codes of the result, without the result
    anything      `settle`     the result

So there is no trace of a model, and nothing to be kept in step with it. Every step is a node of its own in the graph of
autograd, with the edges that torch would have made; the arithmetic is in one node more, where the chain ends:

    conv -> normalization -> sum -> activation -> end -> conv

Backward, the end computes the gradients of all steps at once, and the steps pass theirs on, if nobody can see the tensors
between them: no other operation used one, and none of their Python objects is alive, so that no hook, no
`torch.autograd.grad` and no `backward(inputs=...)` can ask for its gradient. Otherwise every step computes its own.
"""

from fourbit.chains._link import Link as Link
from fourbit.chains._norm import NORM_APPLY as NORM_APPLY
from fourbit.chains._norm import NORM_BACKWARD as NORM_BACKWARD
from fourbit.chains._norm import NORM_STATISTICS as NORM_STATISTICS
from fourbit.chains._norm import Activation as Activation
from fourbit.chains._norm import Norm as Norm
from fourbit.chains._norm import Normalized as Normalized
from fourbit.chains._norm import NormApply as NormApply
from fourbit.chains._norm import NormBackward as NormBackward
from fourbit.chains._norm import NormGradients as NormGradients
from fourbit.chains._norm import NormStatistics as NormStatistics
from fourbit.chains._steps import begin as begin
from fourbit.chains._steps import begin_with as begin_with
from fourbit.chains._steps import can_defer as can_defer
from fourbit.chains._steps import take as take
from fourbit.chains._watch import watch_chains as watch_chains
