"""Camera RAW: a sensor's Bayer mosaic read from a flat file or a camera's container, made linear and demosaiced."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from shared.errors import RequestError

PATTERNS = ("RGGB", "GRBG", "GBRG", "BGGR")
FLAT = (".npy", ".raw")
CONTAINERS = (".dng", ".nef", ".cr2", ".cr3", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw")
RAW_SUFFIXES = FLAT + CONTAINERS
CROSS, SQUARE = [[0.0, 1, 0], [1, 4, 1], [0, 1, 0]], [[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]  # of green, of red and blue

Demosaic = Literal["half", "bilinear"]


class Mosaic(NamedTuple):
    """values: float32 (H, W), 0 at the black level and 1 at the white level.  pattern: colours of the upper left
    2 x 2 pixels, row by row."""

    values: np.ndarray
    pattern: str


@dataclass(frozen=True, kw_only=True)
class Sensor:
    """How mosaics are stored, and how they become images.

    pattern: the Bayer order, one of ``PATTERNS``.  bits: of a pixel; above 8 a flat file holds two bytes a pixel, the
    lower first.  black: the level of no light.  white: of saturation, None: the largest value of ``bits``.
    shape: rows and columns of a .raw file, which does not state them; of a .npy file it is checked where given.
    A camera's container states its own order, levels and shape, and these are not asked; beyond its white level is
    saturated.
    demosaic: "half" makes one pixel of each 2 x 2, red, the mean of its greens, and blue, without interpolation;
    "bilinear" keeps the sides.
    """

    pattern: str = "RGGB"
    bits: int = 14
    black: float = 0.0
    white: float | None = None
    shape: tuple[int, int] | None = None
    demosaic: Demosaic = "half"

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise RequestError(f"Bayer pattern {self.pattern!r}: use one of {', '.join(PATTERNS)}")
        if not 1 <= self.bits <= 16:
            raise RequestError(f"bits {self.bits}: use 1 to 16 of a pixel")
        if not 0 <= self.black < self.saturation <= 2**self.bits - 1:
            levels = f"black level {self.black:g} and white level {self.saturation:g}"
            raise RequestError(f"{levels} of {self.bits} bits: use 0 <= black < white <= {2**self.bits - 1}")
        if self.demosaic not in ("half", "bilinear"):
            raise RequestError(f"demosaic {self.demosaic!r}: use half or bilinear")
        if self.shape is not None:
            if len(self.shape) != 2:
                raise RequestError(f"shape {list(self.shape)} of a mosaic: use [rows, columns]")
            _even("shape", tuple(self.shape))

    @property
    def saturation(self) -> float:
        """The white level."""
        return float(2**self.bits - 1 if self.white is None else self.white)

    def read(self, file: str | Path) -> np.ndarray:
        """A file as a linear image, float32 (3, H, W) from 0 (black level, or below) to 1 (white level).

        Raises RequestError where the file is missing, damaged, of another size or no Bayer mosaic, or a pixel lies
        beyond the white level.
        """
        mosaic = self.mosaic(file)
        return demosaic(mosaic.values, mosaic.pattern, self.demosaic)

    def mosaic(self, file: str | Path) -> Mosaic:
        """The pixels as the sensor gave them, made linear. Raises as ``read`` does."""
        file = Path(file)
        if not file.is_file():
            raise RequestError(f"{file}: no such file")
        suffix = file.suffix.lower()
        if suffix not in RAW_SUFFIXES:
            raise RequestError(f"{file}: no camera RAW by its name; there are {', '.join(RAW_SUFFIXES)}")
        if suffix in CONTAINERS:
            return _container(file)
        pixels = self._array(file) if suffix == ".npy" else self._flat(file)
        return Mosaic(linear(pixels, self.black, self.saturation, str(file)), self.pattern)

    def _flat(self, file: Path) -> np.ndarray:
        if self.shape is None:
            raise RequestError(f"{file}: a .raw file does not state its size; give shape=[rows, columns]")
        dtype = np.dtype("u1" if self.bits <= 8 else "<u2")
        rows, columns = self.shape
        have, want = file.stat().st_size, rows * columns * dtype.itemsize
        if have != want:
            what = "truncated" if have < want else "too large"
            stored = f"{rows} x {columns} pixels of {dtype.itemsize} bytes are {want} bytes"
            raise RequestError(f"{file}: {what}, or of another shape: {have} bytes, where {stored}")
        return np.fromfile(file, dtype).reshape(rows, columns)

    def _array(self, file: Path) -> np.ndarray:
        try:
            pixels = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            line = " ".join(str(error).split())
            raise RequestError(f"{file}: not a readable .npy array, or truncated ({line})") from error
        if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.dtype.kind not in "ui":
            what = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
            raise RequestError(f"{file}: a mosaic is whole numbers (rows, columns), not {what}")
        if self.shape is not None and pixels.shape != tuple(self.shape):
            want = " x ".join(map(str, self.shape))
            raise RequestError(f"{file}: {pixels.shape[0]} x {pixels.shape[1]} pixels, where shape says {want}")
        _even(str(file), pixels.shape)
        return pixels


def linear(pixels: np.ndarray, black: float | np.ndarray, white: float, where: str) -> np.ndarray:
    """Stored numbers (H, W) as float32, 0 at the black level (noise below it is cut) and 1 at the white level.

    black: of all pixels, or (2, 2) of each place of the pattern.  where: what an error calls them.

    Raises RequestError where a pixel lies beyond the white level, or below zero.
    """
    if not pixels.size:
        raise RequestError(f"{where}: holds no pixel")
    least, most = int(pixels.min()), int(pixels.max())
    if most > white or least < 0:
        found = f"a pixel is {most if most > white else least}"
        raise RequestError(f"{where}: {found}, where the levels go from 0 to white {white:g}; check bits and white")
    if isinstance(black, np.ndarray):
        black = np.tile(black, (-(-pixels.shape[0] // 2), -(-pixels.shape[1] // 2)))
        black = black[: pixels.shape[0], : pixels.shape[1]]
    return ((pixels - np.asarray(black, np.float64)) / (white - np.asarray(black))).clip(0, 1).astype(np.float32)


def planes(pattern: str) -> dict[str, list[tuple[int, int]]]:
    """Of each colour, the places (row, column) in the 2 x 2 pattern."""
    return {colour: [divmod(i, 2) for i in range(4) if pattern[i] == colour] for colour in "RGB"}


def demosaic(mosaic: np.ndarray, pattern: str, how: Demosaic = "half") -> np.ndarray:
    """A mosaic (H, W) of even sides as float32 (3, H, W), or (3, H / 2, W / 2) where ``how`` is "half".

    bilinear: a missing value is the mean of its nearest neighbours of that colour, those of them that lie inside; the
    weights of the kernels leave a known one as it is.
    """
    if pattern not in PATTERNS:
        raise RequestError(f"Bayer pattern {pattern!r}: use one of {', '.join(PATTERNS)}")
    _even("a mosaic", mosaic.shape)
    values = mosaic.astype(np.float32)
    if how == "half":
        return np.stack([
            np.mean([values[row::2, column::2] for row, column in places], 0, dtype=np.float32)
            for places in planes(pattern).values()
        ])  # fmt: skip
    image = []
    for colour, places in planes(pattern).items():
        known = np.zeros_like(values)
        for row, column in places:
            known[row::2, column::2] = 1
        kernel = torch.tensor(CROSS if colour == "G" else SQUARE)[None, None]
        sums = F.conv2d(torch.from_numpy(np.stack([values * known, known]))[:, None], kernel, padding=1)
        image.append((sums[0, 0] / sums[1, 0]).numpy())
    return np.stack(image)


def mosaiced(image: np.ndarray, pattern: str) -> np.ndarray:
    """What a sensor of this order keeps of an image (3, H, W) of even sides: (H, W)."""
    if pattern not in PATTERNS:
        raise RequestError(f"Bayer pattern {pattern!r}: use one of {', '.join(PATTERNS)}")
    _even("an image", image.shape[1:])
    mosaic = np.empty_like(image[0])
    for band, places in enumerate(planes(pattern).values()):
        for row, column in places:
            mosaic[row::2, column::2] = image[band, row::2, column::2]
    return mosaic


def _container(file: Path) -> Mosaic:
    """A camera's own file, by LibRaw; its visible pixels, cut to even sides."""
    rawpy: Any = _rawpy()
    try:
        with rawpy.imread(str(file)) as raw:
            tile, names = raw.raw_pattern, raw.color_desc.decode()
            pixels = None if tile is None else np.array(raw.raw_image_visible)
            black, white = list(raw.black_level_per_channel), raw.white_level
    except (rawpy.LibRawError, OSError, ValueError) as error:
        line = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        raise RequestError(f"{file}: not a readable RAW file, or truncated ({line})") from error
    pattern = "" if tile is None else "".join(names[i] for i in np.ravel(tile))
    if tile is None or pixels is None or pixels.ndim != 2 or pattern not in PATTERNS:
        what = f"its sensor's pattern {pattern or '(none)'} is no Bayer mosaic of red, green and blue"
        raise RequestError(f"{file}: {what}")
    rows, columns = (side // 2 * 2 for side in pixels.shape)
    levels = np.array([[black[i] for i in row] for row in tile], np.float64)
    # Cameras store numbers beyond the level LibRaw knows as their white: they are saturated.
    kept = np.minimum(pixels[:rows, :columns], white)
    return Mosaic(linear(kept, levels, float(white), str(file)), pattern)


def _rawpy() -> Any:
    try:
        return importlib.import_module("rawpy")
    except ModuleNotFoundError as error:
        raise RequestError(f"rawpy cannot be imported ({error}); install it: pip install 'omniadapt[raw]'") from error


def _even(what: str, shape: tuple[int, ...]) -> None:
    if min(shape) < 2 or any(side % 2 for side in shape):
        sides = " x ".join(map(str, shape))
        raise RequestError(f"{what}: {sides} pixels; a Bayer mosaic has even sides, from 2 pixels")
