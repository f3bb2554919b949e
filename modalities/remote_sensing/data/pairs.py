"""Pairs: two dates of each scene with a mask of what changed, as the loaders change detection is fed from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from modalities.remote_sensing.data.folders import _chosen, _files, _same_place
from modalities.remote_sensing.data.masks import Labels, read_mask
from modalities.remote_sensing.data.rasters import Header, Image, Raster, Window, open_image, read_header
from modalities.remote_sensing.data.samples import Tiles
from modalities.remote_sensing.data.scenes import Scenes
from modalities.remote_sensing.data.splits import scene_of, split_scenes
from modalities.remote_sensing.data.statistics import IGNORE, Normalisation
from shared.errors import RequestError

CHANGE = ("unchanged", "change")


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


class Pairs(Scenes):
    """What a change detection task is fed: samples as those of ``Scenes``, but ``image`` (2 * bands, H, W) holds the
    bands before and then those after. ``bands`` and ``band_names`` are of one date.

    Both dates are normalised alike, by all valid pixels of both, so that which comes first makes no difference; and
    they are flipped and turned together.
    """

    def samples(self, part: str, augment: bool = False) -> Tiles:
        seed = self.seed if augment else None
        both = of_two_dates(self.normalisation)
        return Tiles(self._source, self._tiles[part], self.tile, both, seed, part != "train")

    def displays(self, image: Tensor | np.ndarray) -> dict[str, np.ndarray]:
        """Pictures of both dates, by date and name."""
        dates = (("before", image[: self.bands]), ("after", image[self.bands :]))
        return {f"{date}, {n}": p for date, one in dates for n, p in super(Pairs, self).displays(one).items()}


def of_two_dates(normalisation: Normalisation) -> Normalisation:
    """That of an image which holds the bands of two dates."""
    return Normalisation(2 * normalisation.mean, 2 * normalisation.std)


class FolderPairs(Pairs):
    """Images of two dates and a mask with the same name in three folders, as LEVIR-CD, WHU-CD and others come.

    folder: holds ``before``, ``after`` and ``label``, or folders that do ("train", "val", "test"). Their names then
        begin those of the scenes: ``group="^[^/]+"`` makes each a scene that ``validation`` and ``test`` can name.
    before, after, label: names of the three folders.
    label_values: the value, or values, of mask files for unchanged and for change.
    reproject: bring each second date, as it is read, to the grid of the first (bilinear), which the mask has too; else
        dates on other grids are refused.
    The other arguments are those of ``FolderScenes``. A pixel that is invalid at either date counts for nothing.

    Raises RequestError with the file named: a folder that is missing, a file without its partners, dates that differ
    in size, place or bands, a mask that does not fit or holds another value, and all that ``read_image`` refuses.
    """

    classes = CHANGE

    def __init__(
        self,
        *,
        folder: str | Path,
        before: str = "A",
        after: str = "B",
        label: str = "label",
        label_values: Sequence[int | str | Sequence[int | str]] = (0, (1, 255)),
        ignore_value: int | str | Sequence[int | str] | None = None,
        bands: Sequence[int | str] | None = None,
        band_names: Sequence[str] | None = None,
        layout: str | None = None,
        fill: float | None = None,
        reproject: bool = False,
        tile: int | None = None,
        overlap: int = 0,
        group: str | None = None,
        validation: float | Sequence[str] = 0.2,
        test: float | Sequence[str] = 0.2,
        normalisation: str | Mapping[str, Sequence[float]] = "measured",
        batch_size: int = 8,
        workers: int = 0,
        seed: int = 0,
        augment: bool = True,
    ):
        files = matched(Path(folder), (before, after, label))
        source = PairSource(
            files, Labels(CHANGE, label_values, ignore_value), bands=bands, band_names=band_names, layout=layout,
            fill=fill, reproject=reproject,
        )  # fmt: skip
        scene_names = [scene_of(name, group) for name in source.names]
        super().__init__(
            source,
            scene_names,
            split_scenes(scene_names, validation=validation, test=test, seed=seed),
            classes=CHANGE,
            tile=tile,
            overlap=overlap,
            normalisation=normalisation,
            batch_size=batch_size,
            workers=workers,
            seed=seed,
            augment=augment,
        )


class PairSource:
    """The files as a ``Source`` of two dates; a read opens its files anew. files: (before, after, mask) by name."""

    def __init__(
        self, files: Mapping[str, tuple[Path, ...]], labels: Labels, *, bands: Sequence[int | str] | None = None,
        band_names: Sequence[str] | None = None, layout: str | None = None, fill: float | None = None,
        reproject: bool = False,
    ):  # fmt: skip
        self._labels, self._files, self._reproject = labels, list(files.values()), reproject
        self.names = list(files)
        headers = [read_header(before, layout=layout) for before, _, _ in self._files]
        self.sizes = [(header.height, header.width) for header in headers]
        numbers, self.band_names = _chosen(headers[0], bands, band_names)
        self.file_bands = headers[0].band_names
        self.reading = {"bands": numbers, "layout": layout, "fill": fill}
        for header, (_, after, mask) in zip(headers, self._files, strict=True):
            later = read_header(after, layout=layout)
            for one in (header, later):
                if one.bands != headers[0].bands:
                    raise RequestError(f"{one.path}: {one.bands} bands, {headers[0].path} has {headers[0].bands}")
            if not reproject:
                check_grid(header, later)
            _same_place(header, read_header(mask))

    def read(self, index: int, window: Window) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        before, after, path = self._files[index]
        with open_pair(before, after, **self.reading, reproject=self._reproject) as pair:
            image, valid, _ = pair.read(window)
        mask = read_mask(path, window=window, colours=self._labels.colours)
        return image, valid, np.where(valid, self._labels.index(path, mask.labels, mask.valid), IGNORE)


def matched(folder: Path, names: tuple[str, ...]) -> dict[str, tuple[Path, ...]]:
    """{name without suffix: its file in each of the folders ``names``}, in the order of names."""
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder")
    parts = [part for part in (folder, *sorted(folder.iterdir())) if (part / names[0]).is_dir()]
    if not parts:
        raise RequestError(f"{folder}: holds no folder {names[0]}, nor does a folder in it")
    found: dict[str, tuple[Path, ...]] = {}
    for part in parts:
        start = "" if part == folder else f"{part.name}/"
        found |= {f"{start}{name}": files for name, files in partners([part / name for name in names]).items()}
    return found


def partners(folders: Sequence[Path]) -> dict[str, tuple[Path, ...]]:
    """{path without suffix: the file in each folder}. Raises RequestError for one that is not in all of them."""
    files = [_files(folder) for folder in folders]
    for name in sorted(set().union(*files)):
        for folder, own in zip(folders, files, strict=True):
            if name not in own:
                (other, *_) = (have[name] for have in files if name in have)
                raise RequestError(f"{other} has no partner: {folder / name}.* is missing")
    return {name: tuple(own[name] for own in files) for name in sorted(files[0])}
