"""Pairs: two dates of each scene with a mask of what changed, as the loaders change detection is fed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from modalities.remote_sensing.data.files import check_place, chosen_bands, files_by_name
from modalities.remote_sensing.data.samples import Tiles
from modalities.remote_sensing.data.scenes import Scenes
from modalities.remote_sensing.data.splits import scene_of
from shared.errors import RequestError
from shared.rasters import IGNORE, Labels, Window, check_grid, of_two_dates, open_pair, read_header, read_mask

CHANGE = ("unchanged", "change")


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
        super().__init__(
            source, [scene_of(name, group) for name in source.names], CHANGE, validation=validation, test=test,
            tile=tile, overlap=overlap, normalisation=normalisation, batch_size=batch_size, workers=workers, seed=seed,
            augment=augment,
        )  # fmt: skip


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
        numbers, self.band_names = chosen_bands(headers[0], bands, band_names)
        self.file_bands = headers[0].band_names
        self.reading = {"bands": numbers, "layout": layout, "fill": fill}
        for header, (_, after, mask) in zip(headers, self._files, strict=True):
            later = read_header(after, layout=layout)
            for one in (header, later):
                if one.bands != headers[0].bands:
                    raise RequestError(f"{one.path}: {one.bands} bands, {headers[0].path} has {headers[0].bands}")
            if not reproject:
                check_grid(header, later)
            check_place(header, read_header(mask))

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
    files = [files_by_name(folder) for folder in folders]
    for name in sorted(set().union(*files)):
        for folder, own in zip(folders, files, strict=True):
            if name not in own:
                (other, *_) = (have[name] for have in files if name in have)
                raise RequestError(f"{other} has no partner: {folder / name}.* is missing")
    return {name: tuple(own[name] for own in files) for name in sorted(files[0])}
