"""Faster backends. Importing this package registers what the machine can run; nothing else imports it by name."""

from fourbit.kernels import cpu as cpu
from fourbit.kernels import cuda as cuda
