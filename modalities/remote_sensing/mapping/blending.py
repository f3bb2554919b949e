"""Blending: the model's scores on overlapping windows, summed by weight into strips of a raster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from modalities.remote_sensing.data.pairs import Pair
from modalities.remote_sensing.data.rasters import Image, Window
from modalities.remote_sensing.data.statistics import Normalisation
from modalities.remote_sensing.mapping.windows import Grid, Panel
from shared.errors import WorkError

Scores = Callable[[Tensor], Tensor]


class Strip(NamedTuple):
    """scores: float32 (classes, rows, columns), blended.  valid: bool (rows, columns).  Both are good until the next
    strip is asked for."""

    scores: np.ndarray
    valid: np.ndarray


class Blender:
    """Runs a model over the windows of one raster.

    scores: normalised float32 images (B, bands, window, window) to class scores (B, classes, window, window).
    batch: windows that the model is given at once.
    """

    def __init__(
        self, scores: Scores, image: Image | Pair, normalisation: Normalisation, grid: Grid, classes: int, batch: int
    ):  # fmt: skip
        self.scores, self.image, self.normalisation = scores, image, normalisation
        self.grid, self.classes, self.batch = grid, classes, batch

    def strips(self, start: int, tick: Callable[[int], None]) -> Iterator[Strip]:
        """All strips from number ``start`` on; each is the same, bit for bit, whatever the start. tick: called with
        the windows done, out of ``grid.windows``."""
        first, band = divmod(start, len(self.grid.rows.starts))
        for number in range(first, len(self.grid.panels)):
            yield from self._panel(number, band, tick)
            band = 0
        tick(self.grid.windows)

    def _panel(self, number: int, first: int, tick: Callable[[int], None]) -> Iterator[Strip]:
        rows, columns, panel = self.grid.rows, self.grid.columns, self.grid.panels[number]
        origin = columns.starts[panel.windows[0]]
        extent = columns.starts[panel.windows[-1]] + columns.window - origin
        inside = slice(panel.left - origin, panel.right - origin)
        before = sum(len(p.windows) for p in self.grid.panels[:number]) * len(rows.starts)
        buffer = np.zeros((self.classes, rows.window, extent), np.float32)
        # Bands that reach into the first strip wanted are run again, so that its sums hold the same terms.
        for band in range(rows.touching(*rows.completed(first))[0], len(rows.starts)):
            valid = np.zeros((rows.window, extent), bool)
            tick(before + band * len(panel.windows))
            self._band(band, panel, buffer, valid)
            start, (top, bottom) = rows.starts[band], rows.completed(band)
            if band >= first:
                yield Strip(
                    buffer[:, top - start : bottom - start, inside], valid[top - start : bottom - start, inside]
                )
            buffer[:, : rows.window - bottom + start] = buffer[:, bottom - start :]
            buffer[:, rows.window - bottom + start :] = 0

    def _band(self, band: int, panel: Panel, buffer: np.ndarray, valid: np.ndarray) -> None:
        """Add the scores of one band of windows to ``buffer`` and note which of its pixels are valid."""
        rows, columns = self.grid.rows, self.grid.columns
        origin = columns.starts[panel.windows[0]]
        for first in range(0, len(panel.windows), self.batch):
            group = panel.windows[first : first + self.batch]
            lefts = [columns.starts[index] - columns.starts[group[0]] for index in group]
            image, seen = self._read(rows.starts[band], columns.starts[group[0]], lefts[-1] + columns.window)
            at = columns.starts[group[0]] - origin
            valid[:, at : at + seen.shape[1]] = seen
            # A window without a valid pixel has nothing to tell.
            kept = [i for i, left in enumerate(lefts) if seen[:, left : left + columns.window].any()]
            for i, scores in zip(kept, self._scores(image, [lefts[i] for i in kept]), strict=True):
                weight = rows.weights[band][:, None] * columns.weights[group[i]]
                buffer[:, :, at + lefts[i] : at + lefts[i] + columns.window] += scores * weight

    def _read(self, row: int, column: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """The normalised pixels (bands, window, width) from ``row`` and ``column`` on, and which of them are pixels of
        the raster and valid. Beyond its edges the raster is continued by its mirror image."""
        height, header = self.grid.rows.window, self.image.header
        top, left = max(row, 0), max(column, 0)
        bottom, right = min(row + height, header.height), min(column + width, header.width)
        image, valid, _ = self.image.read(Window(top, left, bottom - top, right - left))
        image = self.normalisation.apply(image, valid)
        beyond = (top - row, row + height - bottom), (left - column, column + width - right)
        if any(map(any, beyond)):
            image, valid = np.pad(image, ((0, 0), *beyond), mode="reflect"), np.pad(valid, beyond)
        return image, valid

    def _scores(self, image: np.ndarray, lefts: Sequence[int]) -> list[np.ndarray]:
        """The model's scores (classes, window, window) for the windows that begin at these columns of ``image``."""
        if not lefts:
            return []
        size = self.grid.columns.window
        windows = np.stack([image[:, :, left : left + size] for left in lefts])
        scores = self.scores(torch.from_numpy(windows)).float().cpu().numpy()
        if scores.shape != (len(lefts), self.classes, size, size):
            raise WorkError(
                f"the model gives scores of shape {scores.shape} for {self.classes} classes at {size} pixels"
            )
        if not np.isfinite(scores).all():
            path = self.image.header.path
            raise WorkError(f"{path}: the class scores are not finite; the weights hold NaN or the values overflow")
        return list(scores)
