"""Two rasters of one place at two dates, brought to one grid and read as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shared.errors import RequestError
from shared.normalisation import Normalisation
from shared.rasters.reading import Header, Image, Raster, Window, open_image


class Pair(NamedTuple):
    """Two open rasters of one grid, read as one: the header is that of the first."""

    header: Header
    before: Image
    after: Image | _Moved

    def read(self, window: Window | None = None) -> Raster:
        """image float32 (2 * bands, H, W), the bands before and then those after, 0 where either is invalid."""
        one, other = self.before.read(window), self.after.read(window)
        valid = one.valid & other.valid
        return Raster(np.concatenate([one.image, other.image]) * valid, valid, one.georeference)


@contextmanager
def open_pair(
    before: str | Path, after: str | Path, *, bands: Sequence[int], after_bands: Sequence[int] | None = None,
    layout: str | None = None, fill: float | None = None, reproject: bool = False,
) -> Iterator[Pair]:  # fmt: skip
    """Two rasters held open. after_bands: numbers of the second's bands, where they are others.

    reproject: bring the second, as it is read, to the first's grid (bilinear); what it does not cover is invalid.
    Raises RequestError as ``open_image`` does, and where they do not lie on one grid and are not to be reprojected.
    """
    with (
        open_image(before, bands=bands, layout=layout, fill=fill) as one,
        open_image(after, bands=after_bands or bands, layout=layout, fill=fill) as other,
    ):
        if not reproject:
            check_grid(one.header, other.header)
            yield Pair(one.header, one, other)
            return
        with _onto(one.header, other) as moved:
            yield Pair(one.header, one, moved)


def check_grid(before: Header, after: Header) -> None:
    """Raises RequestError, in one line, where two dates differ in size, reference system or place."""
    ask = "cut or reproject it to the first's grid, or ask to reproject"
    if (after.height, after.width) != (before.height, before.width):
        sizes = f"{after.height} x {after.width} pixels, {before.path} {before.height} x {before.width}"
        raise RequestError(f"{after.path}: {sizes}; both dates need one grid: {ask}")
    one, other = before.georeference, after.georeference
    if one is None or other is None:
        return
    if one.crs != other.crs:
        raise RequestError(f"{after.path}: is in {_named(other.crs)}, {before.path} in {_named(one.crs)}; {ask}")
    corners = [np.array([p.at(*c) for c in ((0, 0), (before.width, before.height))]) for p in (one, other)]
    apart = np.abs(corners[0] - corners[1]).max()
    if apart > (abs(one.transform.a) + abs(one.transform.b)) / 2:
        raise RequestError(f"{after.path}: lies up to {apart:g} map units away from {before.path}; {ask}")


def _named(crs: Any) -> str:
    return crs.to_string() if crs else "no reference system"


class _Moved(NamedTuple):
    """An image on another grid. opacity: the band that says where it lies there; None where nodata does."""

    image: Image
    opacity: int | None

    def read(self, window: Window | None = None) -> Raster:
        raster = self.image.read(window)
        if self.opacity is None:
            return raster
        covered = self.image._replace(numbers=[self.opacity]).read(window).image[0] > 0
        valid = raster.valid & covered
        return Raster(raster.image * valid, valid, raster.georeference)


@contextmanager
def _onto(header: Header, image: Image) -> Iterator[_Moved]:
    """The image as it lies on the grid of ``header``."""
    from rasterio.enums import Resampling
    from rasterio.vrt import WarpedVRT

    for one in (header, image.header):
        if one.georeference is None or not one.georeference.crs:
            raise RequestError(f"{one.path}: no coordinate reference system, so the dates cannot be brought together")
    if image.fill is not None:
        path = image.header.path
        raise RequestError(f"{path}: fill {image.fill:g} would blend into the data; declare it as nodata to reproject")
    if image.header.alpha in image.numbers:
        what = f"band {image.header.alpha} is marked as alpha and read as data"
        raise RequestError(f"{image.header.path}: {what}; reproject it before")
    place = header.georeference
    assert place is not None
    added = image.source.nodata is None and image.header.alpha is None
    # By default GDAL takes a pixel for data where any band has some, and then blends the nodata value of the others in.
    with WarpedVRT(
        image.source, crs=place.crs, transform=place.transform, height=header.height, width=header.width,
        resampling=Resampling.bilinear, add_alpha=added, UNIFIED_SRC_NODATA="NO",
    ) as moved:  # fmt: skip
        there = replace(image.header, height=header.height, width=header.width, georeference=place)
        yield _Moved(Image(there, moved, image.numbers, None), moved.count if added else image.header.alpha)


def of_two_dates(normalisation: Normalisation) -> Normalisation:
    """That of an image which holds the bands of two dates."""
    return Normalisation(2 * normalisation.mean, 2 * normalisation.std)
