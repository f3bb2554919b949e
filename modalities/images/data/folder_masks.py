"""Folders of images and of masks in grey: photographs with shadows, aerial images with roads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from modalities.images.data.files import read_image
from modalities.images.data.listing import composed, images_below
from modalities.images.data.masked import MaskedImages
from shared.errors import RequestError


class FolderMasks(MaskedImages):
    """Pairs of an RGB image and a grey mask with the same path below their folders (suffixes may differ).

    images, masks: folders, searched with their subfolders.
    classes: names of what is outside and inside the masks.
    threshold: a mask's pixels above it are inside, of values from 0 to 255 (soft edges fall to the nearer side).
    validation, test: a fraction of the images, drawn by the seed, or their names, without suffix. The rest trains.
    size: pixels a side of what the model sees; images are resized to that square.
    crop: share of each side that a training crop keeps, 1 for the whole image.  flip: mirrored half of the time.
    normalisation: "backbone" (the statistics its weights were trained with), "measured" (on the images that train), or
    {mean: [...], std: [...]} of red, green and blue in values from 0 to 255.
    batch_size: images, in training.  workers: processes that read.
    seed: of the split, the order and the augmentation; None: the run's.

    Raises RequestError, in one line that names the file: a folder that is missing or empty, an image without a mask or
    a mask without an image, sizes that differ, files that are damaged or have other channels.
    """

    def __init__(
        self,
        *,
        images: Path,
        masks: Path,
        classes: Sequence[str] = ("background", "object"),
        threshold: int = 127,
        validation: float | Sequence[str] = 0.2,
        test: float | Sequence[str] = 0.2,
        size: int = 1024,
        crop: float = 0.9,
        flip: bool = True,
        normalisation: str | Mapping[str, Sequence[float]] = "backbone",
        batch_size: int = 2,
        workers: int = 0,
        seed: int | None = None,
    ):
        if not 0 <= threshold < 255:
            raise RequestError(f"threshold {threshold}: use a grey value from 0 to 254")
        super().__init__(
            _Pairs(Path(images), Path(masks), threshold), classes, validation=validation, test=test, size=size,
            crop=crop, flip=flip, normalisation=normalisation, batch_size=batch_size, workers=workers, seed=seed or 0,
        )  # fmt: skip


class _Pairs:
    """The files as a ``MaskSource``."""

    def __init__(self, images: Path, masks: Path, threshold: int):
        if images.resolve() == masks.resolve():
            raise RequestError(f"images and masks are the same folder, {images}")
        left, right = _files(images), _files(masks)
        for have, lack, what, other, folder in (
            (left, right, "image", "mask", masks),
            (right, left, "mask", "image", images),
        ):
            if alone := sorted(set(have) - set(lack)):
                more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
                raise RequestError(f"{what} {have[alone[0]]}{more} has no {other}: {folder / alone[0]}.* is missing")
        self.names, self._threshold = sorted(left), threshold
        self._files = [(left[name], right[name]) for name in self.names]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, mask = self._files[index]
        pixels, grey = read_image(image), read_image(mask, bands=1)[0]
        if pixels.shape[1:] != grey.shape:
            sizes = f"{grey.shape[0]} x {grey.shape[1]} pixels, its image {pixels.shape[1]} x {pixels.shape[2]}"
            raise RequestError(f"{mask}: {sizes}; a mask has its image's size")
        return pixels, grey > self._threshold


def _files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder")
    found: dict[str, Path] = {}
    for path in images_below(folder):
        name = composed(path.relative_to(folder).with_suffix("").as_posix())
        if name in found:
            raise RequestError(f"{found[name]} and {path.name} share one name; keep one of them")
        found[name] = path
    if not found:
        raise RequestError(f"{folder}: holds no image")
    return found
