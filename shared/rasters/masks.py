"""Masks: label rasters of numbers, ranges of numbers or colours, and the class that each stands for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shared.errors import RequestError
from shared.rasters.reading import Window, inside, opened, read_stored

IGNORE = 255  # the class index of a pixel without a label or without data


class Mask(NamedTuple):
    """labels: int64 (H, W), the values as stored.  valid: bool (H, W), False where the file declares no data."""

    labels: np.ndarray
    valid: np.ndarray


def read_mask(path: str | Path, *, window: Window | None = None, colours: bool = False) -> Mask:
    """A label raster with one band of whole numbers (an alpha band, declared nodata and NaN mark invalid pixels).

    Several bands that are equal, as of a grey picture saved in RGB, count as one. colours: labels are 0xRRGGBB, of the
    three bands, of the palette, or grey. Raises RequestError where the file cannot be decoded, its bands differ and are
    no colours, or it holds a fraction or infinity.
    """
    with opened(Path(path), None) as (header, source):
        bands = header.data_bands
        if len(bands) not in (1, 3):
            raise RequestError(f"{path}: a mask has one band of class values, or colours; this file has {len(bands)}")
        stored, declared = read_stored(source, bands, inside(header, window), header.alpha)
        palette = source.colormap(bands[0]) if colours and "palette" in header.band_names else None
    valid = declared & ~np.isnan(stored).any(0)
    values = np.where(valid, stored, 0)
    if np.isinf(values).any():
        raise RequestError(f"{path}: a mask holds whole class values, this file holds infinity")
    labels = values.astype(np.int64)
    if (labels != values).any():
        raise RequestError(f"{path}: a mask holds whole class values, this file holds {values[labels != values][0]:g}")
    if colours:
        return Mask(_coloured(path, labels, palette), valid)
    if (labels != labels[:1]).any():
        raise RequestError(f"{path}: a mask has one band of class values, this file has {len(bands)} that differ; "
                           "where colours are classes, state them: label_values: ['#000000', …]")  # fmt: skip
    return Mask(labels[0], valid)


def _coloured(path: str | Path, labels: np.ndarray, palette: dict[int, Any] | None) -> np.ndarray:
    """Three bands, one of palette indices or one of grey (bands, H, W) as colours 0xRRGGBB (H, W)."""
    if (labels < 0).any() or (labels > 255).any():
        raise RequestError(f"{path}: holds {labels.min()} to {labels.max()}; colours go from 0 to 255")
    if palette is not None:
        labels = np.array([palette.get(index, (0, 0, 0))[:3] for index in range(256)])[labels[0]].transpose(2, 0, 1)
    red, green, blue = labels if len(labels) == 3 else (labels[0],) * 3
    return red << 16 | green << 8 | blue


class Labels:
    """From the values of mask files to class indices. colours: the values are colours, 0xRRGGBB (see ``read_mask``)."""

    def __init__(
        self,
        classes: Sequence[str],
        values: Sequence[int | str | Sequence[int | str]] | None = None,
        ignore: int | str | Sequence[int | str] | None = None,
    ):
        values = range(len(classes)) if values is None else values
        if len(values) != len(classes):
            raise RequestError(f"label_values: {len(values)} for {len(classes)} classes; give one entry for each class")
        stated = [*values, *([] if ignore is None else [ignore])]
        coloured = {str(value).startswith("#") for own in stated for value in _parts(own)}
        if len(coloured) > 1:
            raise RequestError(f"label_values {list(values)} and ignore_value {ignore}: colours, or numbers, not both")
        self.colours = True in coloured
        entries = [(value, index) for index, own in enumerate(values) for value in _listed(own)]
        entries += [(value, IGNORE) for value in _listed(ignore)]
        known = dict(sorted(entries))
        if len(known) < len(entries):
            raise RequestError(
                f"label_values {list(values)} and ignore_value {ignore}: a value stands for one class only"
            )
        self._values, self._classes = np.array(list(known)), np.array(list(known.values()))

    def index(self, path: Path | str, stored: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Values as stored (H, W) to class indices, IGNORE where not ``valid``; any other value raises RequestError."""
        place = np.searchsorted(self._values, stored).clip(max=len(self._values) - 1)
        strange = valid & (self._values[place] != stored)
        if strange.any():
            found, known = (self._shown(values) for values in (np.unique(stored[strange])[:5], self._values))
            what = "colours" if self.colours else "values"
            raise RequestError(f"{path}: {what} {found} stand for no class; label_values and ignore_value have {known}")
        return np.where(valid, self._classes[place], IGNORE)

    def _shown(self, values: np.ndarray) -> str:
        if self.colours:
            return f"[{', '.join(f'#{value:06x}' for value in values)}]"
        listed = values.tolist()
        return str(listed) if len(listed) <= 20 else f"{len(listed)} values, {listed[0]} to {listed[-1]}"


def _parts(entry: int | str | Sequence[int | str]) -> Sequence[int | str]:
    return [entry] if isinstance(entry, (int, str)) else entry


def _listed(entry: int | str | Sequence[int | str] | None) -> list[int]:
    """All values of an entry of ``label_values``."""
    found: list[int] = []
    for part in [] if entry is None else _parts(entry):
        if isinstance(part, int):
            found.append(part)
        elif match := re.fullmatch("#([0-9a-fA-F]{6})", part):
            found.append(int(match[1], 16))
        elif (match := re.fullmatch(r"(\d{1,5})-(\d{1,5})", part)) and int(match[1]) <= int(match[2]):
            found += range(int(match[1]), int(match[2]) + 1)
        else:
            raise RequestError(f"label_values: {part!r} is no value: give a number, a range '128-255' or '#rrggbb'")
    return found
