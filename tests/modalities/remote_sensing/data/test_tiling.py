"""Tiling: every pixel in a tile, every tile inside, and each pixel counted once where the repeated part is left out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modalities.remote_sensing.data.tiling import tiles
from shared.errors import RequestError


@given(
    height=st.integers(1, 90), width=st.integers(1, 90), size=st.integers(1, 64), share=st.floats(0, 0.95)
)  # fmt: skip
def test_tiles_cover_all_and_stay_inside(height, width, size, share):
    seen, fresh = np.zeros((height, width), int), np.zeros((height, width), int)
    for (row, column, h, w), seen_rows, seen_columns in tiles(height, width, size, int(share * size)):
        assert (h, w) == (min(size, height), min(size, width))
        assert 0 <= row <= height - h
        assert 0 <= column <= width - w
        seen[row : row + h, column : column + w] += 1
        fresh[row + seen_rows : row + h, column + seen_columns : column + w] += 1
    assert seen.min() >= 1
    assert (fresh == 1).all()


def test_the_last_tile_is_moved_inside():
    assert [tile.window[:2] for tile in tiles(100, 64, 64)] == [(0, 0), (36, 0)]
    assert [tile.seen_rows for tile in tiles(100, 64, 64)] == [0, 28]
    assert [tile.window.row for tile in tiles(128, 64, 64, overlap=32)] == [0, 32, 64]


def test_without_a_size_the_raster_is_one_tile():
    (tile,) = tiles(31, 57, None)
    assert tile == ((0, 0, 31, 57), 0, 0)


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (64, 64), (64, -1)])
def test_impossible_tiles_are_refused(size, overlap):
    with pytest.raises(RequestError, match=f"tile {size} with overlap {overlap}"):
        tiles(100, 100, size, overlap)
