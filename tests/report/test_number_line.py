"""Pictures of number formats."""

from __future__ import annotations

import pytest

from fourbit import formats
from fourbit.report import draw_number_line


@pytest.mark.parametrize("name", formats.names())
def test_every_format_can_be_drawn_with_all_its_numbers(name, tmp_path):
    figure = draw_number_line(formats.get(name))
    drawn = figure.axes[0].collections[0].get_segments()
    assert len(drawn) == len(formats.get(name).grid)
    if formats.get(name).bits <= 8:
        figure.savefig(tmp_path / "line.png")
        assert (tmp_path / "line.png").stat().st_size > 5000
