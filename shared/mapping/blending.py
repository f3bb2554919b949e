"""Blending: the model's scores on overlapping windows, summed by weight into strips of a raster."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared.errors import WorkError
from shared.mapping.windows import Grid
from shared.normalisation import Normalisation
from shared.rasters import Image, Pair, Stack, Window

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
        self, scores: Scores, image: Image | Pair | Stack, normalisation: Normalisation, grid: Grid, classes: int,
        batch: int,
    ):  # fmt: skip
        self.scores, self.image, self.normalisation = scores, image, normalisation
        self.grid, self.classes, self.batch = grid, classes, batch

    def strips(self, start: int, tick: Callable[[int], None]) -> Generator[Strip, None, None]:
        """All strips from number ``start`` on; each is the same, bit for bit, whatever the start. tick: called with
        the windows done, out of ``grid.windows``."""
        first, band = divmod(start, len(self.grid.rows.starts))
        for number in range(first, len(self.grid.panels)):
            yield from self._panel(number, band, tick)
            band = 0
        tick(self.grid.windows)

    def _panel(self, number: int, first: int, tick: Callable[[int], None]) -> Generator[Strip, None, None]:
        rows, columns, panel = self.grid.rows, self.grid.columns, self.grid.panels[number]
        origin, extent = columns.span(panel.windows)
        inside = slice(panel.left - origin, panel.right - origin)
        before = sum(len(p.windows) for p in self.grid.panels[:number]) * len(rows.starts)
        buffer = np.zeros((self.classes, rows.window, extent), np.float32)
        # Bands that reach into the first strip wanted are run again, so that its sums hold the same terms.
        bands = range(rows.touching(*rows.completed(first))[0], len(rows.starts))
        groups = [panel.windows[at : at + self.batch] for at in range(0, len(panel.windows), self.batch)]
        places = ((rows.starts[band], *columns.span(group)) for band in bands for group in groups)
        with closing(_ahead(self._read, places)) as pixels:
            for band in bands:
                valid = np.zeros((rows.window, extent), bool)
                tick(before + band * len(panel.windows))
                for group in groups:
                    self._add(band, group, next(pixels), origin, buffer, valid)
                start, (top, bottom) = rows.starts[band], rows.completed(band)
                if band >= first:
                    strip = slice(top - start, bottom - start)
                    yield Strip(buffer[:, strip, inside], valid[strip, inside])
                buffer[:, : rows.window - bottom + start] = buffer[:, bottom - start :]
                buffer[:, rows.window - bottom + start :] = 0

    def _add(
        self, band: int, group: Sequence[int], pixels: tuple[np.ndarray, np.ndarray], origin: int, buffer: np.ndarray,
        valid: np.ndarray,
    ) -> None:  # fmt: skip
        """Add the scores of a group of windows of one band to ``buffer`` and note which of its pixels are valid."""
        rows, columns = self.grid.rows, self.grid.columns
        image, seen = pixels
        begin = columns.starts[group[0]]
        lefts = [columns.starts[index] - begin for index in group]
        valid[:, begin - origin : begin - origin + seen.shape[1]] = seen
        # A window without a valid pixel has nothing to tell.
        kept = [i for i, left in enumerate(lefts) if seen[:, left : left + columns.window].any()]
        for i, scores in zip(kept, self._scores(image, [lefts[i] for i in kept]), strict=True):
            weight = rows.weights[band][:, None] * columns.weights[group[i]]
            at = begin - origin + lefts[i]
            buffer[:, :, at : at + columns.window] += scores * weight

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


def _ahead(read: Callable[..., Any], places: Iterable[tuple[Any, ...]]) -> Generator[Any, None, None]:
    """What ``read`` gives for each place, in order; a thread reads the next one while this one is worked on."""
    with ThreadPoolExecutor(1) as pool:
        coming: Future | None = None
        for place in places:
            following = pool.submit(read, *place)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()
