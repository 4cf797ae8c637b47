"""One thread, except where a test says otherwise: most tensors here are small, and tests share the machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kernel_cases import threads


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield
