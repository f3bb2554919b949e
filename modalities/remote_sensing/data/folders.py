"""Folders of images and masks: PNG, JPEG, GeoTIFF or .npy, any number of bands, any dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modalities.remote_sensing.data.files import check_place, chosen_bands, files_by_name
from modalities.remote_sensing.data.scenes import Scenes
from modalities.remote_sensing.data.splits import scene_of
from shared.errors import RequestError
from shared.rasters import (
    IGNORE,
    Labels,
    Window,
    gather,
    open_stack,
    read_header,
    read_image,
    read_mask,
    read_stack_header,
)


class FolderScenes(Scenes):
    """Pairs of an image and a mask with the same path below their folders (suffixes may differ), split by scene.

    images, masks: folders, searched with their subfolders.
    classes: names, in the order of the class index.
    label_values: for each class what mask files hold for it: a value, a range "128-255", a colour "#ff0000" (of RGB or
        palette pictures), or a list of such (0, 1, 2 ... if not given).
    ignore_value: what of mask files stands for no label, stated in the same way.
    band_files: where every band is a file of its own, for each band how the name of its files is, with ``*`` for the
        scene: ``{red: "red_*", nir: "nir_*"}`` (see ``shared.rasters.gather``). They give ``band_names``.
    mask_files: the same for masks, which may then lie in the folder of the images: ``"gt_*"``.
    bands: which bands, by name or by number from 1, in the order wanted (all if not given).
    band_names: names of all bands of a file, in its order (as the files describe them if not given).
    layout: "HWC" or "CHW" of .npy files, where their shape leaves it open.
    fill: a pixel whose bands all hold this value has no data, beside what the files declare as nodata.
    tile: size of a square tile in pixels (the whole image if not given, then all images have one size).
    overlap: pixels that neighbouring training tiles share.
    group: a regular expression that finds the scene in the path below ``images`` without suffix, by its group
        ``scene``, its first group or the whole match: ``"^(?P<scene>[A-Za-z]+_\\d+)_"``. Without it a file is a scene.
    validation, test: a fraction of the scenes, drawn by ``seed``, or names of scenes. The rest trains.
    normalisation: "measured" on the valid pixels of the training split, or ``{mean: [...], std: [...]}`` in stored
        units, one number for each chosen band.
    batch_size: tiles.  workers: processes that load them (0: none).  seed: of split, order and augmentation.
    augment: flips and quarter turns of training tiles.

    Raises RequestError with the file named: a folder that is missing or empty, an image without a mask or a mask
    without an image, sizes or places on Earth that differ, files that differ in bands, a label outside the mapping,
    and all that ``read_image`` and ``read_mask`` refuse.
    """

    def __init__(
        self,
        *,
        images: str | Path,
        masks: str | Path,
        classes: Sequence[str],
        label_values: Sequence[int | str | Sequence[int | str]] | None = None,
        ignore_value: int | str | Sequence[int | str] | None = None,
        bands: Sequence[int | str] | None = None,
        band_names: Sequence[str] | None = None,
        band_files: Mapping[str, str] | None = None,
        mask_files: str | None = None,
        layout: str | None = None,
        fill: float | None = None,
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
        labels = Labels(classes, label_values, ignore_value)
        source = FolderSource(
            images, masks, labels, bands=bands, band_names=band_names, band_files=band_files, mask_files=mask_files,
            layout=layout, fill=fill,
        )  # fmt: skip
        super().__init__(
            source, [scene_of(name, group) for name in source.names], classes, validation=validation, test=test,
            tile=tile, overlap=overlap, normalisation=normalisation, batch_size=batch_size, workers=workers, seed=seed,
            augment=augment,
        )  # fmt: skip


class FolderSource:
    """The paired files as a ``Source``; a read opens its files anew, so nothing is held and workers share nothing."""

    def __init__(
        self,
        images: str | Path,
        masks: str | Path,
        labels: Labels,
        *,
        bands: Sequence[int | str] | None = None,
        band_names: Sequence[str] | None = None,
        band_files: Mapping[str, str] | None = None,
        mask_files: str | None = None,
        layout: str | None = None,
        fill: float | None = None,
    ):
        if band_files is not None and band_names is not None:
            raise RequestError("band_names and band_files: give one, the files of bands name them")
        self._labels, self._stacked = labels, band_files is not None
        pairs = _pairs(
            _scenes(Path(images), band_files), _scenes(Path(masks), {"mask": mask_files} if mask_files else None)
        )
        self.names = list(pairs)
        self._images, self._masks = [image for image, _ in pairs.values()], [mask for _, (mask,) in pairs.values()]
        own = None if band_files is None else tuple(band_files)
        headers = [read_stack_header(f, own, layout) if own else read_header(f[0], layout=layout) for f in self._images]
        self.sizes = [(header.height, header.width) for header in headers]
        numbers, self.band_names = chosen_bands(headers[0], bands, own or band_names)
        self.file_bands = headers[0].band_names
        self.reading: dict[str, Any] = {"bands": numbers, "layout": layout, "fill": fill}
        self.reading |= {} if band_files is None else {"band_files": dict(band_files)}
        for header, mask in zip(headers, self._masks, strict=True):
            if header.bands != headers[0].bands:
                raise RequestError(
                    f"{header.path}: {header.bands} bands, but {headers[0].path.name} has {headers[0].bands}"
                )
            check_place(header, read_header(mask))

    def read(self, index: int, window: Window) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        files, reading = self._images[index], {k: v for k, v in self.reading.items() if k != "band_files"}
        if self._stacked:
            with open_stack(files, **reading) as stack:
                image, valid, _ = stack.read(window)
        else:
            image, valid, _ = read_image(files[0], window=window, **reading)
        return image, valid, np.where(valid, self.labels(index, window), IGNORE)

    def labels(self, index: int, window: Window | None = None) -> np.ndarray:
        """The mask alone, int64 (H, W)."""
        mask = read_mask(self._masks[index], window=window, colours=self._labels.colours)
        return self._labels.index(self._masks[index], mask.labels, mask.valid)


def _scenes(folder: Path, patterns: Mapping[str, str] | None) -> tuple[Path, dict[str, tuple[Path, ...]]]:
    """A folder, and the files of each scene in it by name."""
    if patterns:
        return folder, gather(folder, patterns)
    return folder, {name: (path,) for name, path in files_by_name(folder).items()}


def _pairs(
    left: tuple[Path, dict[str, tuple[Path, ...]]], right: tuple[Path, dict[str, tuple[Path, ...]]]
) -> dict[str, tuple[tuple[Path, ...], tuple[Path, ...]]]:
    """{scene: (files of the image, that of the mask)}, in the order of names."""
    (images, ours), (masks, theirs) = left, right
    if ours == theirs:
        raise RequestError(f"images and masks are the same folder, {images}")
    for have, lack, what, other, folder in (
        (ours, theirs, "image", "mask", masks),
        (theirs, ours, "mask", "image", images),
    ):
        if alone := sorted(set(have) - set(lack)):
            more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
            raise RequestError(f"{what} {have[alone[0]][0]}{more} has no {other}: {folder / alone[0]}.* is missing")
    return {name: (ours[name], theirs[name]) for name in sorted(ours)}
