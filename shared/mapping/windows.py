"""Windows: where a raster is cut for a model, and how much each window counts at every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from shared.errors import RequestError

BLOCK = 256  # pixels along the tiles of a written GeoTIFF; panels end at multiples of it


@dataclass(frozen=True)
class Axis:
    """Windows along one axis of a raster.

    starts: first pixels, ascending; the first window begins outside, and the last ends there.  weights: float32
    (windows, window), of each window along its pixels; over the windows they sum to 1 at every pixel of the raster.
    """

    length: int
    window: int
    starts: tuple[int, ...]
    weights: np.ndarray

    def completed(self, index: int) -> tuple[int, int]:
        """The pixels (from, up to) that are complete once window ``index`` is there, and were not before."""
        last = index + 1 == len(self.starts)
        return max(self.starts[index], 0), self.length if last else self.starts[index + 1]

    def span(self, windows: Sequence[int]) -> tuple[int, int]:
        """The first pixel of neighbouring windows, and how many they cover together."""
        return self.starts[windows[0]], self.starts[windows[-1]] + self.window - self.starts[windows[0]]

    def touching(self, low: int, high: int) -> range:
        """Numbers of the windows that hold a pixel of ``low`` to ``high`` (exclusive)."""
        indices = [i for i, start in enumerate(self.starts) if start < high and start + self.window > low]
        return range(indices[0], indices[-1] + 1)


def cut(length: int, window: int, overlap: int) -> Axis:
    """Windows that cover ``length`` pixels and ``overlap // 4`` more at either end, where the raster is continued by
    its mirror image. Neighbours share ``overlap`` pixels; the last one is moved inside and shares more.

    Where two windows overlap, the outer quarter of each counts nothing and the middle half passes from one to the other
    along a squared sine. A pixel is therefore told only by windows in which it lies at least ``overlap // 4`` pixels
    inside: of a model that sees no further, the result is the same whatever the windows.
    """
    margin = overlap // 4
    last = length + margin - window
    # More than one window: the second begins inside, so that every one completes some pixels.
    starts = (*range(-margin, last, window - overlap), max(last, 1)) if last > -margin else (-margin,)
    weights = np.ones((len(starts), window))
    rise = _rise(overlap)
    weights[1:, :overlap] *= rise
    weights[:-1, window - overlap :] *= rise[::-1]
    total = np.zeros(max(starts[-1] + window, length) + margin)
    for start, weight in zip(starts, weights, strict=True):
        total[start + margin : start + margin + window] += weight
    for start, weight in zip(starts, weights, strict=True):
        weight /= total[start + margin : start + margin + window]
    return Axis(length, window, starts, weights.astype(np.float32))


def _rise(overlap: int) -> np.ndarray:
    margin = overlap // 4
    ramp = overlap - 2 * margin
    sine = np.sin(np.pi / 2 * (np.arange(ramp) + 0.5) / max(ramp, 1)) ** 2
    return np.concatenate([np.zeros(margin), sine, np.ones(margin)])


class Panel(NamedTuple):
    """Columns ``left`` to ``right`` (exclusive) of the result, and the windows along the columns that they need."""

    left: int
    right: int
    windows: range


@dataclass(frozen=True)
class Grid:
    """All windows of a raster. A panel is worked through in bands of windows from top to bottom, each completing a
    strip of its rows; the panels, one after another, bound what has to be held at once."""

    rows: Axis
    columns: Axis
    overlap: int
    panels: tuple[Panel, ...]

    @property
    def strips(self) -> int:
        """Strips of all panels."""
        return len(self.panels) * len(self.rows.starts)

    @property
    def windows(self) -> int:
        """Windows of all panels; those at the border of two panels count for both."""
        return sum(len(panel.windows) for panel in self.panels) * len(self.rows.starts)


def grid(height: int, width: int, window: int, overlap: int | None, buffer: int) -> Grid:
    """The windows of a raster. overlap: half a window if None.  buffer: pixels of a band of windows that may be
    held at once, so that a panel is at most ``buffer / window`` pixels wide (and at least four blocks).

    Raises RequestError for an overlap that is no part of a window.
    """
    overlap = window // 2 if overlap is None else overlap
    if window < 1 or not 0 <= overlap <= window // 2:
        raise RequestError(f"window {window} with overlap {overlap}: at least 1 pixel, sharing at most half of them")
    rows, columns = cut(height, window, overlap), cut(width, window, overlap)
    wide = max(4, buffer // window // BLOCK) * BLOCK
    edges = [*range(0, width, wide), width]
    panels = (Panel(a, b, columns.touching(a, b)) for a, b in pairwise(edges))
    return Grid(rows, columns, overlap, tuple(panels))
