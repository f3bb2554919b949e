"""Rasters: any supported file, or a window of it, as numbers, a mask of what is valid, and a place on Earth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shared.errors import RequestError
from shared.rasters.arrays import open_array
from shared.rasters.gdal import complaints, quiet, reason
from shared.store import check_readable

# A file is decoded as what its name says and as nothing else (a .png that is a virtual raster stays closed).
_DRIVERS = {".tif": "GTiff", ".tiff": "GTiff", ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
SUFFIXES = (*_DRIVERS, ".npy")


class Window(NamedTuple):
    """A rectangle of a raster, in pixels."""

    row: int
    column: int
    height: int
    width: int


@dataclass(frozen=True)
class Georeference:
    """Where a raster lies: a rasterio ``CRS`` (or None) and the affine ``transform`` of (column, row) to map units."""

    crs: Any
    transform: Any

    def at(self, column: float, row: float) -> tuple[float, float]:
        """Map coordinates of a corner of a pixel."""
        a, b, c, d, e, f = self.transform[:6]
        return a * column + b * row + c, d * column + e * row + f


@dataclass(frozen=True)
class Header:
    """What a file says of itself before a pixel is read. ``alpha``: the 1-based band that holds opacity, or None."""

    path: Path
    bands: int
    height: int
    width: int
    dtype: str
    band_names: tuple[str, ...]
    alpha: int | None
    georeference: Georeference | None

    @property
    def data_bands(self) -> list[int]:
        """The numbers, from 1, of all bands but alpha."""
        return [number for number in range(1, self.bands + 1) if number != self.alpha]


class Raster(NamedTuple):
    """image: float32 (bands, H, W), 0 where invalid.  valid: bool (H, W).  georeference: of the window, or None."""

    image: np.ndarray
    valid: np.ndarray
    georeference: Georeference | None


def read_header(path: str | Path, *, layout: str | None = None) -> Header:
    """The size, bands and georeference of a raster file. ``layout``: "HWC" or "CHW", for .npy. Raises RequestError."""
    with opened(Path(path), layout) as (header, _):
        return header


class Image(NamedTuple):
    """An open raster, read by window. numbers: of the bands read, from 1."""

    header: Header
    source: Any
    numbers: list[int]
    fill: float | None

    def read(self, window: Window | None = None) -> Raster:
        """A window, or all, as ``read_image`` gives it; it may hold no valid pixel."""
        where = inside(self.header, window)
        stored, declared = read_stored(self.source, self.numbers, where, self.header.alpha)
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, hence invalid
            image = np.array(stored, dtype=np.float32, order="C")
        valid = declared & np.isfinite(image).all(0)
        if self.fill is not None:
            valid &= (stored != self.fill).any(0)
        image[:, ~valid] = 0
        return Raster(image, valid, _shifted(self.header.georeference, where))


def check_name(path: Path) -> None:
    """Raises RequestError for a file whose name GDAL cannot be told."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise RequestError(f"{path}: the name is not UTF-8; rename it") from None


def check_spectral(header: Header) -> None:
    """Raises RequestError for a file whose bands are no measured values."""
    if "palette" in header.band_names:
        raise RequestError(f"{header.path}: an image of palette indices has no spectral bands; convert it to RGB")
    if header.dtype.startswith("complex"):
        raise RequestError(f"{header.path}: holds complex numbers; store amplitude and phase, or both parts, as bands")


@contextmanager
def open_image(
    path: str | Path,
    *,
    bands: Sequence[int] | None = None,
    layout: str | None = None,
    fill: float | None = None,
) -> Iterator[Image]:
    """A raster held open for reading many windows; arguments and errors are those of ``read_image``."""
    with opened(Path(path), layout) as (header, source):
        numbers = list(bands) if bands else header.data_bands
        if missing := [n for n in numbers if not 1 <= n <= header.bands]:
            raise RequestError(f"{path}: no band {missing[0]}; it has bands 1 to {header.bands}")
        check_spectral(header)
        yield Image(header, source, numbers, fill)


def read_image(
    path: str | Path,
    *,
    bands: Sequence[int] | None = None,
    window: Window | None = None,
    layout: str | None = None,
    fill: float | None = None,
) -> Raster:
    """A raster, or a ``window`` of it, as float32 in stored units (scale and offset tags are not applied).

    bands: numbers counted from 1, in the order wanted; all but an alpha band if not given (an alpha band asked for by
    number is data). A pixel is invalid where any of these bands is NaN, infinite or the file's nodata value, where the
    alpha band or the file's mask is 0, or where every band equals ``fill``. layout: "HWC" or "CHW" of a .npy file with
    three axes. Raises RequestError for a file that cannot be decoded, lacks a band, or holds no valid pixel at all.
    """
    with open_image(path, bands=bands, layout=layout, fill=fill) as image:
        raster = image.read(window)
    if not raster.valid.any() and raster.valid.shape == (image.header.height, image.header.width):
        raise RequestError(f"{path}: no valid pixel (all NaN, nodata or transparent); leave the file out or mend it")
    return raster


@contextmanager
def opened(path: Path, layout: str | None = None) -> Iterator[tuple[Header, Any]]:
    """A file's header with an open rasterio dataset, or with a (bands, H, W) array where it is .npy.

    Whatever fails in opening or decoding becomes a RequestError that names the file.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise RequestError(f"{path}: not a raster this reads; use {', '.join(SUFFIXES)}")
    check_name(path)
    check_readable(path)
    if path.stat().st_size == 0:
        raise RequestError(f"{path}: empty (0 bytes)")
    if path.suffix.lower() == ".npy":
        array = open_array(path, layout)
        bands, height, width = array.shape
        yield Header(path, bands, height, width, str(array.dtype), _numbered(bands), None, None), array
        return
    driver = _DRIVERS[path.suffix.lower()]
    with quiet() as rasterio:
        from rasterio.errors import RasterioError

        try:
            with complaints() as said, rasterio.open(path, driver=driver) as dataset:
                header = _header(path, dataset)
                if lost := [message for message in said if "IO error" in message or "corrupt" in message]:
                    raise RequestError(f"{path}: damaged ({lost[0].splitlines()[0]})")
                yield header, dataset
        except RasterioError as error:
            raise RequestError(f"{path}: damaged, or not {driver} ({reason(error)})") from error


def _header(path: Path, dataset: Any) -> Header:
    colours = tuple(colour.name for colour in dataset.colorinterp)
    alpha = colours.index("alpha") + 1 if "alpha" in colours else None
    names = tuple(dataset.descriptions) if all(dataset.descriptions) else colours
    if len(set(names)) < len(names) or {"undefined", "gray"} & set(names):
        names = _numbered(dataset.count)
    known = dataset.crs is not None or not dataset.transform.is_identity
    place = Georeference(dataset.crs, dataset.transform) if known else None
    return Header(path, dataset.count, dataset.height, dataset.width, dataset.dtypes[0], names, alpha, place)


def _numbered(bands: int) -> tuple[str, ...]:
    return tuple(f"band {number}" for number in range(1, bands + 1))


def read_stored(source: Any, numbers: Sequence[int], where: Window, alpha: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Bands as stored (n, H, W), and what the file itself says of validity (H, W): nodata, alpha, mask band."""
    rows, columns = slice(where.row, where.row + where.height), slice(where.column, where.column + where.width)
    if isinstance(source, np.ndarray):
        stored = source[[number - 1 for number in numbers], rows, columns]
        return stored, np.ones(stored.shape[1:], bool)
    from rasterio.enums import MaskFlags
    from rasterio.windows import Window as RasterioWindow

    window = RasterioWindow.from_slices(rows, columns)
    stored = source.read(list(numbers), window=window)
    valid = np.ones(stored.shape[1:], bool)
    for number, values in zip(numbers, stored, strict=True):
        if (nodata := source.nodatavals[number - 1]) is not None:
            valid &= values != nodata
    if MaskFlags.per_dataset in source.mask_flag_enums[numbers[0] - 1] and alpha not in numbers:
        valid &= source.read_masks(numbers[0], window=window) > 0
    return stored, valid


def inside(header: Header, window: Window | None) -> Window:
    window = window or Window(0, 0, header.height, header.width)
    bottom, right = window.row + window.height, window.column + window.width
    if min(window) < 0 or not window.height or not window.width or bottom > header.height or right > header.width:
        raise RequestError(f"{header.path}: {window} lies outside its {header.height} x {header.width} pixels")
    return window


def _shifted(place: Georeference | None, window: Window) -> Georeference | None:
    if place is None:
        return None
    a, b, _, d, e, _ = place.transform[:6]
    x, y = place.at(window.column, window.row)
    return Georeference(place.crs, type(place.transform)(a, b, x, d, e, y))
