"""Numbers of the tokens that every translation model gives a meaning of its own, as `fourbit.data` counts them."""

PAD, BEGIN, END = 0, 1, 2
