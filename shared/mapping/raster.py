"""Mapping: a model's prediction for one raster of any size, from file to file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shared.errors import RequestError, WorkError
from shared.mapping import geotiff, polygons
from shared.mapping.blending import Blender, Scores, Strip
from shared.mapping.feed import Feed
from shared.mapping.partial import Strips, clear, partial
from shared.mapping.windows import Grid, grid
from shared.rasters import (
    IGNORE,
    Header,
    Image,
    Pair,
    Stack,
    check_grid,
    check_name,
    of_two_dates,
    open_image,
    open_pair,
    open_stack,
    quiet,
    read_header,
    read_stack_header,
)

# What can be written, and the file names it goes by.
SUFFIXES = {"classes": (".tif", ".tiff"), "probabilities": (".tif", ".tiff"), "polygons": (".geojson", ".json")}
BUFFER = 2**28  # bytes of blended scores held at once
CACHE = 256  # megabytes of decoded blocks that GDAL may keep

Tick = Callable[[str, int, int], None]


class Mapped(NamedTuple):
    """What became of one raster.

    pixels: of each class; None where an earlier prediction had finished the target already.
    nodata: pixels without data.  resumed: whether a prediction that was cut off went on.
    """

    target: Path
    height: int
    width: int
    resumed: bool = False
    pixels: dict[str, int] | None = None
    nodata: int = 0


def map_raster(
    scores: Scores,
    source: str | Path | Sequence[Path],
    target: str | Path,
    feed: Feed,
    *,
    output: str = "classes",
    window: int | None = None,
    overlap: int | None = None,
    batch: int = 8,
    bands: Sequence[int] | None = None,
    after: str | Path | None = None,
    reproject: bool = False,
    overwrite: bool = False,
    identity: Mapping[str, Any] | None = None,
    tick: Tick | None = None,
) -> Mapped:
    """Predict every pixel of ``source`` and write ``target``, whole or not at all.

    source: a raster; for a model that was trained on band files, those of one scene in the order of its patterns.
    scores: normalised float32 images (B, bands, window, window) to class scores, at least 0, (B, classes, window,
        window).
    output: "classes" (GeoTIFF, uint8, 255 without data), "probabilities" (GeoTIFF, float32, NaN without data; blended
        scores that sum to 1) or "polygons" (GeoJSON).
    window: pixels along a side (as trained if None).  overlap: pixels that neighbours share, at most half of the window
        (half of it if None); see ``windows.cut`` for how they blend.  batch: windows the model is given at once.
    bands: numbers of the bands to read, where the file's own names or count would mislead (see ``Feed.numbers``).
    after: the raster of the second date, for models that compare two; the images then hold the bands of ``source`` and
        those of ``after``.  reproject: read it on the grid of ``source`` (see ``shared.rasters.open_pair``).
    identity: JSON-able facts that tell the model from any other; a prediction that was cut off goes on only with equal
        ones, and a target that was made with them is left as it is unless ``overwrite``.
    tick: called with what is being done ("predicting", "writing" or "tracing"), how much is done, and of how much.

    Memory is bounded whatever the raster's size: by ``BUFFER`` of scores, ``CACHE`` of decoded blocks, a batch, and for
    polygons all outlines. On disk, the uncompressed result lies beside the target until that is written.

    A pixel that is invalid in any band the model reads has no data in the result. Raises RequestError for a source that
    cannot be read or does not fit, holds no valid pixel or breaks off, and for a target that is an input or exists;
    WorkError where the model's scores are not finite or the disk is full.
    """
    second = None if after is None else _Second(Path(after), reproject)
    files = (Path(source),) if isinstance(source, (str, Path)) else tuple(source)
    feed.check_files(str(files[0]), len(files))
    job = _job(files, Path(target), feed, output, window, overlap, batch, bands, identity, second)
    if job.target.exists() and not overwrite:
        if (polygons if output == "polygons" else geotiff).read_digest(job.target) != job.digest:
            raise RequestError(f"{target} exists and is another prediction or none; rename it, or ask to overwrite it")
        clear(job.target)
        return Mapped(job.target, job.header.height, job.header.width)
    return _run(job, scores, feed, batch, tick or (lambda *_: None))


class _Second(NamedTuple):
    """The raster of a second date. numbers: of its bands to read."""

    path: Path
    reproject: bool
    numbers: Sequence[int] = ()


class _Job(NamedTuple):
    """What is to be done. files: the raster, or one for each band.  numbers: of the bands to read.  settings: all that
    the result follows from."""

    files: tuple[Path, ...]
    header: Header
    target: Path
    output: str
    numbers: list[int]
    grid: Grid
    settings: dict[str, Any]
    second: _Second | None

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()


def _job(
    files: tuple[Path, ...], target: Path, feed: Feed, output: str, window: int | None, overlap: int | None, batch: int,
    bands: Sequence[int] | None, identity: Mapping[str, Any] | None, second: _Second | None,
) -> _Job:  # fmt: skip
    if batch < 1:
        raise RequestError(f"batch {batch}: at least 1 window")
    if feed.band_files is None:
        header = read_header(files[0], layout=feed.layout)
    else:
        header = read_stack_header(files, [band for band, _ in feed.band_files], feed.layout)
    _check(files, header, target, output)
    numbers = feed.numbers(header, bands)
    window = feed.window if window is None else window
    windows = grid(header.height, header.width, window, overlap, BUFFER // (4 * len(feed.classes)))
    settings = {
        "format": 1,
        "source": [fact for file in files for fact in _state(file)],
        "feed": asdict(feed),
        "bands": numbers,
        "output": "probabilities" if output == "probabilities" else "classes",
        "windows": [window, windows.overlap, len(windows.panels), batch],
        "model": dict(identity or {}),
    }
    if second is not None:
        second = _second(second, header, target, feed, bands)
        settings["after"] = [*_state(second.path), *second.numbers, second.reproject]
    return _Job(files, header, target, output, numbers, windows, settings, second)


def _second(
    second: _Second, header: Header, target: Path, feed: Feed, bands: Sequence[int] | None
) -> _Second:  # fmt: skip
    """With the bands to read; refused where it does not fit the first date."""
    later = read_header(second.path, layout=feed.layout)
    if target.exists() and target.samefile(second.path):
        raise RequestError(f"{target}: the result would overwrite its own input")
    if not second.reproject:
        check_grid(header, later)
    return second._replace(numbers=feed.numbers(later, bands))


def _state(path: Path) -> list[Any]:
    """A file, and what changes when it does."""
    found = path.stat()
    return [str(path.resolve()), found.st_size, found.st_mtime_ns]


def _run(job: _Job, scores: Scores, feed: Feed, batch: int, say: Tick) -> Mapped:
    header, shares = job.header, job.output == "probabilities"
    depth, dtype = (len(feed.classes), "float32") if shares else (1, "uint8")
    with partial(job.target, job.settings, job.grid, depth, dtype) as (folder, strips):
        resumed = strips.count > 0
        normalisation = feed.normalisation if job.second is None else of_two_dates(feed.normalisation)
        with _opened(job, feed) as image:
            blender = Blender(scores, image, normalisation, job.grid, len(feed.classes), batch)
            blended = blender.strips(strips.count, lambda done: say("predicting", done, job.grid.windows))
            _append(strips, blended, _shares if shares else _classes)
        path, pixels = _written(job, folder, strips, feed.classes, say)
        os.replace(path, job.target)
    counts = dict(zip(feed.classes, pixels.tolist(), strict=False))
    return Mapped(job.target, header.height, header.width, resumed, counts, int(pixels[-1]))


def _append(strips: Strips, blended: Generator[Strip, None, None], made: Callable[[Strip], np.ndarray]) -> None:
    """Put all strips on the disk, each by a thread while the model works on the next one."""
    with closing(blended), ThreadPoolExecutor(1) as writer:
        last: Future | None = None
        for strip in blended:
            finished = made(strip)
            if last is not None:
                last.result()
            last = writer.submit(strips.append, finished)
        if last is not None:
            last.result()


def _check(files: Sequence[Path], header: Header, target: Path, output: str) -> None:
    """Raises RequestError for a target that cannot be this output of this source."""
    if output not in SUFFIXES:
        raise RequestError(f"output {output!r}: use {', '.join(SUFFIXES)}")
    if target.suffix.lower() not in SUFFIXES[output]:
        raise RequestError(f"{target}: {output} are written to a file named {' or '.join(SUFFIXES[output])}")
    check_name(target)
    if target.is_dir():
        raise RequestError(f"{target}: a folder; name a file in it")
    if target.exists() and any(target.samefile(file) for file in files):
        raise RequestError(f"{target}: the result would overwrite its own input")
    if output == "polygons" and not has_crs(header):
        raise RequestError(
            f"{header.path}: no coordinate reference system, and GeoJSON is in longitude and latitude; "
            "ask for classes, or georeference it"
        )


def has_crs(header: Header) -> bool:
    """Whether a raster says where on Earth it lies."""
    return header.georeference is not None and bool(header.georeference.crs)


@contextmanager
def _opened(job: _Job, feed: Feed) -> Iterator[Image | Pair | Stack]:
    with quiet() as rasterio, rasterio.Env(GDAL_CACHEMAX=CACHE), _reading(job, feed) as image:
        yield image


def _reading(job: _Job, feed: Feed) -> AbstractContextManager[Image | Pair | Stack]:
    (source, *_), second = job.files, job.second
    reading: dict[str, Any] = {"bands": job.numbers, "layout": feed.layout, "fill": feed.fill}
    if feed.band_files is not None:
        return open_stack(job.files, **reading)
    if second is None:
        return open_image(source, **reading)
    return open_pair(source, second.path, after_bands=second.numbers, reproject=second.reproject, **reading)


def _classes(strip: Strip) -> np.ndarray:
    """The class with the highest score, of equals the first: uint8 (1, rows, columns)."""
    return np.where(strip.valid, strip.scores.argmax(0), IGNORE).astype(np.uint8)[None]


def _shares(strip: Strip) -> np.ndarray:
    """Scores that sum to 1: float32 (classes, rows, columns)."""
    total = np.maximum(strip.scores.sum(0), np.finfo(np.float32).tiny)
    return np.where(strip.valid, strip.scores / total, np.float32(np.nan))


def _written(
    job: _Job, folder: Path, strips: Strips, classes: Sequence[str], say: Tick
) -> tuple[Path, np.ndarray]:  # fmt: skip
    """The finished file, still in the folder of the partial result, and the pixels of each class and of none."""
    header, path, outlines = job.header, folder / "map.tif", folder / "map.geojson"
    total = header.height * header.width
    try:
        place = header.georeference
        pixels = geotiff.write_map(path, strips, place, classes, job.digest, lambda done: say("writing", done, total))
        if not pixels[:-1].any():
            what = "no valid pixel (all NaN, nodata or transparent); leave the file out or mend it"
            raise RequestError(f"{header.path}: {what}")
        if job.output != "polygons":
            return path, pixels
        traced = int(pixels[:-1].sum())
        polygons.write_polygons(path, outlines, classes, job.digest, lambda done: say("tracing", done, traced))
        return outlines, pixels
    except WorkError as error:
        raise WorkError(f"{job.target}: {error}") from error
