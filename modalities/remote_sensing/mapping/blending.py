"""Blending: the model's scores on overlapping windows, summed by weight into strips of a raster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

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
        self, scores: Scores, image: Image, normalisation: Normalisation, grid: Grid, classes: int, batch: int
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
        for band in range(rows.touching(rows.starts[first], rows.end(first))[0], len(rows.starts)):
            valid = np.zeros((rows.window, extent), bool)
            tick(before + band * len(panel.windows))
            self._band(band, panel, buffer, valid)
            height = rows.end(band) - rows.starts[band]
            if band >= first:
                yield Strip(buffer[:, :height, inside], valid[:height, inside])
            buffer[:, : rows.window - height] = buffer[:, height:]
            buffer[:, rows.window - height :] = 0

    def _band(self, band: int, panel: Panel, buffer: np.ndarray, valid: np.ndarray) -> None:
        """Add the scores of one band of windows to ``buffer`` and note which of its pixels are valid."""
        rows, columns = self.grid.rows, self.grid.columns
        origin = columns.starts[panel.windows[0]]
        for first in range(0, len(panel.windows), self.batch):
            group = panel.windows[first : first + self.batch]
            starts = [columns.starts[index] for index in group]
            images, seen = self._read(rows.starts[band], starts)
            at = starts[0] - origin
            valid[: len(seen), at : at + seen.shape[1]] = seen
            # A window without a valid pixel has nothing to tell.
            kept = [i for i, s in enumerate(starts) if seen[:, s - starts[0] : s - starts[0] + columns.window].any()]
            for i, scores in zip(kept, self._scores(images, starts, kept), strict=True):
                weight = rows.weights[band][:, None] * columns.weights[group[i]]
                left = starts[i] - origin
                buffer[:, :, left : left + columns.window] += scores * weight

    def _read(self, row: int, starts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The normalised pixels under some windows of a band, and which are valid."""
        rows, columns = self.grid.rows, self.grid.columns
        height = min(rows.window, rows.length)
        width = min(starts[-1] - starts[0] + columns.window, columns.length)
        image, valid, _ = self.image.read(Window(row, starts[0], height, width))
        image = self.normalisation.apply(image, valid)
        below, right = rows.window - height, max(columns.window - width, 0)
        if below or right:  # a raster smaller than a window is continued by its mirror image
            image = np.pad(image, ((0, 0), (0, below), (0, right)), mode="reflect")
        return image, valid

    def _scores(self, image: np.ndarray, starts: Sequence[int], kept: Sequence[int]) -> list[np.ndarray]:
        if not kept:
            return []
        size = self.grid.columns.window
        windows = np.stack([image[:, :, starts[i] - starts[0] :][:, :, :size] for i in kept])
        scores = self.scores(torch.from_numpy(windows)).float().cpu().numpy()
        if scores.shape != (len(kept), self.classes, size, size):
            raise WorkError(
                f"the model gives scores of shape {scores.shape} for {self.classes} classes at {size} pixels"
            )
        if not np.isfinite(scores).all():
            where = f"{self.image.header.path}, columns {starts[0]} to {starts[-1] + size}"
            raise WorkError(f"{where}: the class scores are not finite; the weights hold NaN or the values overflow")
        return list(scores)
