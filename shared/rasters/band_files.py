"""Band files: scenes whose bands are files of their own, found by the pattern of each band and read as one raster."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shared.errors import RequestError
from shared.rasters.reading import Header, Image, Raster, Window, open_image, read_header
from shared.rasters.search import rasters_below


def gather(folder: Path, patterns: Mapping[str, str]) -> dict[str, tuple[Path, ...]]:
    """{scene: its files in the order of ``patterns``}, of everything below a folder.

    patterns: for each band how the end of a path is, without suffix, with one ``*`` for the name of the scene:
    ``red_*`` of ``train_red/red_patch_1.TIF``, or ``B04/*``. Files that fit no pattern are left alone.
    Raises RequestError where a pattern has not one ``*`` or fits no file, two files fit one pattern and scene, or a
    scene lacks a band.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder")
    found: dict[str, dict[str, Path]] = {band: {} for band in patterns}
    files = [(path, path.relative_to(folder).with_suffix("").as_posix()) for path in rasters_below(folder)]
    for band, pattern in patterns.items():
        if pattern.count("*") != 1:
            raise RequestError(f"band_files: {band}: {pattern!r} needs one * for the name of a scene")
        start, end = (re.escape(part) for part in pattern.split("*"))
        matches = ((path, re.search(f"(?:^|/){start}([^/]+){end}$", name)) for path, name in files)
        for path, name in ((path, match[1]) for path, match in matches if match):
            if name in found[band]:
                raise RequestError(f"{found[band][name]} and {path} are both {band} of {name}; keep one of them")
            found[band][name] = path
        if not found[band]:
            raise RequestError(f"{folder}: no raster below it is named {pattern} ({band})")
    for name in sorted(set().union(*found.values())):
        if lacking := [band for band in found if name not in found[band]]:
            have = next(own[name] for own in found.values() if name in own)
            raise RequestError(
                f"{have} has no {lacking[0]}: a file {patterns[lacking[0]].replace('*', name)}.* is missing"
            )
    first = next(iter(found.values()))
    return {name: tuple(own[name] for own in found.values()) for name in sorted(first)}


class Stack(NamedTuple):
    """Open files of one band each, read as one raster; the header has the bands that are read."""

    header: Header
    images: tuple[Image, ...]
    fill: float | None

    def read(self, window: Window | None = None) -> Raster:
        """image float32 (bands, H, W), 0 where any band is invalid or all hold ``fill``. It may hold no valid pixel."""
        rasters = [image.read(window) for image in self.images]
        for image, raster in zip(self.images, rasters, strict=True):
            if (raster.image != raster.image[:1]).any():
                raise RequestError(f"{image.header.path}: {len(raster.image)} bands that differ; a band file holds one")
        bands = np.stack([raster.image[0] for raster in rasters])
        valid = np.logical_and.reduce([raster.valid for raster in rasters])
        if self.fill is not None:
            valid &= (bands != self.fill).any(0)
        return Raster(bands * valid, valid, rasters[0].georeference)


@contextmanager
def open_stack(
    files: Sequence[Path], *, bands: Sequence[int] | None = None, layout: str | None = None, fill: float | None = None
) -> Iterator[Stack]:
    """The files of one scene held open. bands: numbers, from 1, of the files wanted, in that order (all if not given).

    A file may hold its band several times over, as a grey picture saved in RGB does. Raises RequestError as
    ``open_image`` does, and where the files differ in size or place on Earth.
    """
    wanted = files if bands is None else [files[number - 1] for number in bands]
    with ExitStack() as held:
        images = tuple(held.enter_context(open_image(path, layout=layout)) for path in wanted)
        yield Stack(stack_header([image.header for image in images]), images, fill)


def stack_header(headers: Sequence[Header], names: Sequence[str] | None = None) -> Header:
    """The header of files read as one raster: that of the first, with a band for each."""
    first = headers[0]
    for other in headers[1:]:
        if (other.height, other.width) != (first.height, first.width):
            sizes = f"{other.height} x {other.width} pixels, {first.path} {first.height} x {first.width}"
            raise RequestError(f"{other.path}: {sizes}; resample the bands of a scene to one grid")
        one, two = first.georeference, other.georeference
        if (
            one
            and two
            and (one.crs != two.crs or not one.transform.almost_equals(two.transform, abs(one.transform.a) / 2))
        ):
            raise RequestError(
                f"{other.path}: lies elsewhere than {first.path}; bring the bands of a scene to one grid"
            )
    numbered = tuple(f"band {number}" for number in range(1, len(headers) + 1))
    return replace(first, bands=len(headers), band_names=tuple(names or numbered), alpha=None)


def read_stack_header(files: Sequence[Path], names: Sequence[str] | None = None, layout: str | None = None) -> Header:
    """The header of all files of a scene, read as one raster."""
    return stack_header([read_header(path, layout=layout) for path in files], names)
