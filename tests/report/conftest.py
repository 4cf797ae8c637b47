"""Run folders that tests write, and coarse figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from run_folders import write_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`make_run(name, **what)` writes the run folder `tmp_path/name`."""
    return lambda name, **what: write_run(tmp_path / name, **what)


@pytest.fixture(scope="session", autouse=True)
def coarse_figures():
    """Draw few pixels: the tests look at what is on a page, not at how sharp it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fourbit.report._html.DPI", 40)
        yield
