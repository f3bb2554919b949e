"""Scenes: tiles of labelled rasters, split by scene and normalised, as the loaders a segmentation task is fed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from modalities.remote_sensing.data.composites import shown
from modalities.remote_sensing.data.samples import Tiles
from modalities.remote_sensing.data.splits import SPLITS, split_scenes
from modalities.remote_sensing.data.statistics import Source, Survey, measured, survey
from modalities.remote_sensing.data.tiling import Tile, tiles
from shared.errors import RequestError
from shared.normalisation import Normalisation, given
from shared.rasters import IGNORE
from shared.training.order import EpochSampler


class Scenes:
    """What a task is fed: ``train()``, ``validation()``, ``test()`` loaders of one ``Source`` of labelled rasters.

    A sample is ``{"image": float32 (bands, H, W), "mask": int64 (H, W), "name": str}``; a pixel that is invalid or was
    added to fill a tile has image 0 and mask ``ignore_index``. Validation and test tiles do not overlap, and what the
    last tile of a row or column repeats is ignored, so that a score counts every labelled pixel once.

    scene_names: the scene of each raster of ``source``.  The other arguments are those of ``FolderScenes``. Pixels are
    first read when a loader or ``describe`` is asked for: then every raster is, once, so that bad input shows before
    training does.
    """

    ignore_index = IGNORE

    def __init__(
        self,
        source: Source,
        scene_names: Sequence[str],
        classes: Sequence[str],
        *,
        validation: float | Sequence[str],
        test: float | Sequence[str],
        tile: int | None,
        overlap: int,
        normalisation: str | Mapping[str, Sequence[float]],
        batch_size: int,
        workers: int,
        seed: int,
        augment: bool,
    ):
        self.split = split_scenes(scene_names, validation=validation, test=test, seed=seed)
        if len(set(classes)) < len(classes) or not 2 <= len(classes) <= IGNORE:
            raise RequestError(f"classes {tuple(classes)}: 2 to {IGNORE} different names")
        if batch_size < 1 or workers < 0 or seed < 0:
            raise RequestError(f"batch_size {batch_size}, workers {workers} and seed {seed}: at least 1, 0 and 0")
        if tile is None and len(sizes := sorted(set(source.sizes))) > 1:
            raise RequestError(
                f"images differ in size ({sizes[0]} and {sizes[-1]} pixels), so state the size of a tile"
            )
        self.classes, self.band_names, self.bands = tuple(classes), source.band_names, len(source.band_names)
        self.tile, self.overlap, self.augment = tile, overlap, augment
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self._source, self._scene_names = source, tuple(scene_names)
        self._given = None if normalisation == "measured" else given(normalisation, source.band_names)
        self._rasters = {part: self._members(getattr(self.split, part)) for part in SPLITS}
        self._tiles = {part: self._cut(part) for part in SPLITS}

    def train(self) -> DataLoader:
        """Shuffled anew each epoch; order, flips and turns follow from the seed and the epoch alone."""
        sampler = EpochSampler(len(self._tiles["train"]), self.seed)
        return self._loader("train", sampler, augment=self.augment)

    def validation(self) -> DataLoader:
        """In the order of files and tiles, as they are."""
        return self._loader("validation")

    def test(self) -> DataLoader:
        """In the order of files and tiles, as they are."""
        return self._loader("test")

    @cached_property
    def normalisation(self) -> Normalisation:
        """As stated, or measured on the valid pixels of the training split."""
        if self._given is not None:
            return self._given
        return measured((self._surveys[index] for index in self._rasters["train"]), self.band_names)

    def describe(self) -> dict[str, Any]:
        """What was read, as JSON: classes, bands, normalisation, and for each split its scenes, tiles and pixels.

        ``reading`` and ``normalisation`` are what it takes to feed a new file to a model trained on these:
        ``read_image(path, **reading)``, then ``Normalisation(mean, std).apply``. ``file_bands`` are all bands of a file
        as it names them, and ``window`` the pixels along a side (the shorter one) of what a model sees at once.
        """
        return {
            "kind": type(self).__name__,
            "classes": list(self.classes),
            "band_names": list(self.band_names),
            "file_bands": list(self._source.file_bands),
            "ignore_index": self.ignore_index,
            "tile": self.tile,
            "window": self.tile or min(self._source.sizes[0]),
            "overlap": self.overlap,
            "augment": self.augment,
            "reading": self._source.reading,
            "seed": self.seed,
            "normalisation": {
                "kind": "given" if self._given else "measured",
                "mean": list(self.normalisation.mean),
                "std": list(self.normalisation.std),
            },
            "splits": {part: self._describe(part) for part in SPLITS},
        }

    def display(self, image: Tensor | np.ndarray) -> np.ndarray:
        """The first of ``displays``."""
        return next(iter(self.displays(image).values()))

    def displays(self, image: Tensor | np.ndarray) -> dict[str, np.ndarray]:
        """A normalised image (bands, H, W) as pictures, uint8 (H, W, 3), by name (see ``composites``)."""
        return shown(image, self.normalisation, self.band_names)

    def samples(self, part: str, augment: bool = False) -> Tiles:
        """The samples of a split (``"train"``, ``"validation"``, ``"test"``), in the order of files and tiles."""
        seed = self.seed if augment else None
        return Tiles(self._source, self._tiles[part], self.tile, self.normalisation, seed, part != "train")

    def _members(self, scenes: tuple[str, ...]) -> list[int]:
        return [index for index, scene in enumerate(self._scene_names) if scene in scenes]

    def _cut(self, part: str) -> list[tuple[int, Tile]]:
        overlap = self.overlap if part == "train" else 0
        return [(i, tile) for i in self._rasters[part] for tile in tiles(*self._source.sizes[i], self.tile, overlap)]

    @cached_property
    def _surveys(self) -> list[Survey]:
        return [survey(self._source, index, len(self.classes)) for index in range(len(self._source.names))]

    def _describe(self, part: str) -> dict[str, Any]:
        rasters = self._rasters[part]
        pixels = [sum(self._surveys[i].pixels[c] for i in rasters) for c in range(len(self.classes) + 1)]
        return {
            "scenes": list(getattr(self.split, part)),
            "images": len(rasters),
            "tiles": len(self._tiles[part]),
            "pixels": dict(zip((*self.classes, "ignored"), pixels, strict=True)),
        }

    def _loader(self, part: str, sampler: Sampler[int] | None = None, augment: bool = False) -> DataLoader:
        if not self._tiles[part]:
            raise RequestError(f"there is no {part} split: ask for a fraction above 0 or name its scenes")
        if not sum(sum(self._surveys[index].pixels[:-1]) for index in self._rasters[part]):
            raise RequestError(f"no pixel of the {part} split has a label: every one is invalid or ignored")
        dataset = self.samples(part, augment)
        # A generator of its own, so that loading leaves the global random state alone.
        return DataLoader(
            dataset,
            self.batch_size,
            sampler=sampler,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),
        )
