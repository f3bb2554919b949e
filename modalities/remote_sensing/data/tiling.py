"""Tiling: which windows of a raster become samples, so that every pixel is seen and a score counts it once."""

from __future__ import annotations

from typing import NamedTuple

from shared.errors import RequestError
from shared.rasters import Window


class Tile(NamedTuple):
    """One window of a raster.

    seen_rows, seen_columns: how many of its first rows and columns an earlier tile of the same row or column of tiles
    already holds; a score that leaves them out counts each pixel of the raster once.
    """

    window: Window
    seen_rows: int
    seen_columns: int


def tiles(height: int, width: int, size: int | None, overlap: int = 0) -> list[Tile]:
    """Tiles of ``size`` x ``size`` pixels that cover a raster, row by row; the whole raster if ``size`` is None.

    Neighbours share ``overlap`` pixels. The last tile of a row or column is moved inside rather than dropped, and so
    shares more; a raster smaller than a tile gives one tile of its own size.
    """
    if size is None:
        return [Tile(Window(0, 0, height, width), 0, 0)]
    if size < 1 or not 0 <= overlap < size:
        raise RequestError(
            f"tile {size} with overlap {overlap}: a tile is at least 1 pixel and overlaps by less than its size"
        )
    rows, columns = _starts(height, size, size - overlap), _starts(width, size, size - overlap)
    return [
        Tile(Window(row, column, min(size, height), min(size, width)), seen_rows, seen_columns)
        for row, seen_rows in rows
        for column, seen_columns in columns
    ]


def _starts(length: int, size: int, stride: int) -> list[tuple[int, int]]:
    """(start, how much of it the one before covers) of the tiles along one axis."""
    starts = [*range(0, max(length - size, 0), stride), max(length - size, 0)]
    return [(start, 0 if not i else starts[i - 1] + size - start) for i, start in enumerate(starts)]
