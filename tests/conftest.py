"""What tests of every package share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from instruction_sets import instruction_set, isas


@pytest.fixture(params=isas() or [None])
def isa(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """The test once with the CPU kernels of each instruction set that this processor has; once, with None, without kernels."""
    with instruction_set(request.param):
        yield request.param
