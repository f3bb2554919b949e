"""Windows: they cover a raster, their weights add up to one, and what lies near their edges does not count."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import RequestError
from shared.mapping.windows import BLOCK, cut, grid


@st.composite
def axes(draw) -> tuple[int, int, int]:
    window = draw(st.integers(1, 70))
    return draw(st.integers(1, 300)), window, draw(st.integers(0, window // 2))


@given(axes())
def test_weights_add_up_to_one_at_every_pixel(axis):
    length, window, overlap = axis
    found, margin, total = cut(*axis), overlap // 4, np.zeros(length + 4 * window)
    for start, weight in zip(found.starts, found.weights, strict=True):
        total[start + margin : start + margin + window] += weight
    np.testing.assert_allclose(total[margin : margin + length], 1, atol=1e-6)
    assert (found.weights >= 0).all()
    assert list(found.starts) == sorted(set(found.starts))
    assert all(b - a <= window - overlap for a, b in zip(found.starts, found.starts[1:], strict=False))


@given(axes())
def test_a_pixel_counts_only_where_it_lies_well_inside_a_window(axis):
    length, window, overlap = axis
    found, margin = cut(*axis), overlap // 4
    for index, (start, weight) in enumerate(zip(found.starts, found.weights, strict=True)):
        assert index == 0 or not weight[:margin].any()
        assert index + 1 == len(found.starts) or not weight[window - margin :].any()
        low, high = found.completed(index)
        assert start + margin <= low or index > 0
        assert low < high
    assert found.starts[0] == -margin
    assert found.starts[-1] + window >= length + margin
    assert [found.completed(i) for i in range(len(found.starts))][-1][1] == length
    assert found.completed(0)[0] == 0


def test_the_blend_of_two_windows_by_hand():
    found = cut(18, 12, 4)  # the outer pixel of each counts nothing, the two between pass over
    assert found.starts == (-1, 7)
    rise = np.sin(np.pi / 2 * np.array([0.25, 0.75])) ** 2
    np.testing.assert_allclose(found.weights[0], [*[1] * 9, *rise[::-1], 0], atol=1e-7)
    np.testing.assert_allclose(found.weights[1], [0, *rise, *[1] * 9], atol=1e-7)
    assert (found.completed(0), found.completed(1)) == ((0, 7), (7, 18))


def test_panels_cover_the_columns_in_whole_blocks():
    found = grid(100, 5000, 64, 16, buffer=64 * 1100)
    assert [(p.left, p.right) for p in found.panels] == [
        (0, 1024),
        (1024, 2048),
        (2048, 3072),
        (3072, 4096),
        (4096, 5000),
    ]
    assert all(panel.left % BLOCK == 0 for panel in found.panels)
    for panel in found.panels:
        starts = [found.columns.starts[i] for i in panel.windows]
        assert starts[0] <= panel.left
        assert starts[-1] + 64 >= panel.right
    assert len(grid(100, 5000, 64, 16, buffer=2**30).panels) == 1


@pytest.mark.parametrize(("window", "overlap"), [(0, 0), (-3, 0), (32, 17), (32, -1)])
def test_windows_that_cannot_be_are_refused(window, overlap):
    with pytest.raises(
        RequestError, match=rf"window {window} with overlap {overlap}: at least 1 pixel, sharing at most half"
    ):
        grid(10, 10, window, overlap, 2**20)
