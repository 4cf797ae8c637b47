"""Pictures of number formats."""

from __future__ import annotations

import pytest

from fourbit import formats
from fourbit.report import draw_number_line


@pytest.mark.parametrize("name", formats.names())
def test_every_format_can_be_drawn_a_coarse_one_with_all_its_numbers(name, tmp_path):
    format = formats.get(name)
    figure = draw_number_line(format)
    if format.bits <= 8:
        drawn = figure.axes[0].collections[0].get_segments()
        assert len(drawn) == len(format.grid)
    figure.savefig(tmp_path / "line.png")
    assert (tmp_path / "line.png").stat().st_size > 5000


def test_a_fine_grid_is_drawn_by_its_precision_from_the_smallest_number_to_the_largest():
    format = formats.get("fp16_169")
    (axis,) = draw_number_line(format).axes
    magnitudes, errors = axis.lines[0].get_data()
    assert format.smallest < magnitudes[0] < 1.01 * format.smallest
    assert 0.99 * format.max < magnitudes[-1] < format.max
    assert 2**-11 <= min(errors) <= max(errors) <= 2**-10  # 9 bits of mantissa
    assert axis.get_xscale() == axis.get_yscale() == "log"
