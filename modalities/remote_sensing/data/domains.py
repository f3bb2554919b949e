"""Two domains: a source that trains with its labels, and a target that is tested and whose images may train without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from modalities.remote_sensing.data.biome import BANDS, CLASSES
from modalities.remote_sensing.data.folders import FolderScenes
from modalities.remote_sensing.data.generated import GeneratedSource
from modalities.remote_sensing.data.samples import Tiles
from modalities.remote_sensing.data.scenes import Scenes
from modalities.remote_sensing.data.statistics import Source
from shared.errors import RequestError
from shared.rasters import IGNORE, Window

SOURCE, TARGET = 0, 1


class Domains:
    """What a task over two domains is fed.

    A training sample is a tile of the source (see ``Scenes``); with ``pairs`` it also has ``target``, the image (bands,
    H, W) of a tile of the target's training split, and ``target_valid`` bool (H, W), false where that has no data. No
    label of the target is in it. Samples of validation and test are of both domains, the source's first, never in one
    batch; ``domain`` (0 or 1) tells which, and so does their name.
    Both domains are normalised alike, as the source measures or as stated.
    """

    ignore_index = IGNORE

    def __init__(self, source: Scenes, target: Scenes, pairs: bool):
        self.source, self.target, self.pairs = source, target, pairs
        self.classes, self.bands, self.band_names = target.classes, target.bands, target.band_names

    def train(self) -> DataLoader:
        """As many samples an epoch as the source has; the order follows from the seed and the epoch alone."""
        plain = self.source.train()
        if not self.pairs:
            return plain
        target = self.target.samples("train", self.target.augment)
        dataset = Pairs(self.source.samples("train", self.source.augment), target, self.source.seed)
        return self._loader(dataset, batch_size=self.source.batch_size, sampler=plain.sampler)

    def validation(self) -> DataLoader:
        """Source, then target, in the order of files and tiles, as they are."""
        return self._both("validation")

    def test(self) -> DataLoader:
        """Source, then target, in the order of files and tiles, as they are."""
        return self._both("test")

    def describe(self) -> dict[str, Any]:
        """What the target says of itself (see ``Scenes.describe``), with the same of the source as ``source``."""
        mine = {"kind": type(self).__name__, "pairs": self.pairs, "source": self.source.describe()}
        return self.target.describe() | mine

    def displays(self, image: Tensor | np.ndarray) -> dict[str, np.ndarray]:
        """A normalised image (bands, H, W) as pictures, uint8 (H, W, 3), by name (see ``composites``)."""
        return self.target.displays(image)

    def _both(self, part: str) -> DataLoader:
        loaders = [getattr(domain, part)() for domain in (self.source, self.target)]
        dataset = ConcatDataset([Told(loader.dataset, domain) for domain, loader in enumerate(loaders)])
        batches, start = [], 0
        for loader in loaders:
            batches += [[start + i for i in batch] for batch in loader.batch_sampler]
            start += len(loader.dataset)
        return self._loader(dataset, batch_sampler=batches)

    def _loader(self, dataset: Dataset, **order: Any) -> DataLoader:
        workers = self.source.workers
        return DataLoader(
            dataset, num_workers=workers, persistent_workers=workers > 0, pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.source.seed), **order,
        )  # fmt: skip


class Told(Dataset):
    """Samples that say of which domain they are."""

    def __init__(self, samples: Any, domain: int):
        self.samples, self.domain = samples, domain

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        return sample | {"domain": self.domain, "name": f"{('source', 'target')[self.domain]}/{sample['name']}"}


class Pairs(Dataset):
    """Position ``epoch * len + i``: tile i of the source as ``Tiles`` augments it, and the image of a target tile.

    Target tiles come in passes, each in an order of its own drawn from ``seed``, so that all are seen equally often.
    """

    def __init__(self, source: Tiles, target: Tiles, seed: int):
        self.source, self.seed = source, seed
        self.target = Tiles(
            Unlabelled(target.source), target.tiles, target.size, target.normalisation, target.seed, False
        )
        if not len(self.target):
            raise RequestError("the target has no train split to adapt to: leave it scenes beside those that test")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> dict[str, Any]:
        turn, place = divmod(position, len(self.target))
        order = np.random.default_rng([self.seed, turn]).permutation(len(self.target))
        other = self.target[turn * len(self.target) + int(order[place])]
        return self.source[position] | {
            "target": other["image"], "target_valid": other["mask"] != IGNORE, "target_name": other["name"],
        }  # fmt: skip


class _Reread:
    """A source of the same rasters, whose subclasses change what is read."""

    def __init__(self, source: Source):
        self._source = source
        self.names, self.sizes, self.reading = source.names, source.sizes, source.reading
        self.band_names, self.file_bands = source.band_names, source.file_bands


class Unlabelled(_Reread):
    """The labels are replaced, as they are read, by the class 0 wherever a pixel is valid."""

    def read(self, index: int, window: Window) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        image, valid, _ = self._source.read(index, window)
        return image, valid, np.zeros(valid.shape, np.int64)


class FolderDomains(Domains):
    """Two domains in folders, each as ``FolderScenes`` reads them: Potsdam and Vaihingen, LoveDA's rural and urban ...

    images, masks, label_values, ignore_value, bands, band_names, layout, fill, group, validation, test: of the source,
    as in ``FolderScenes``.
    target_images, target_masks, target_bands, target_band_names, target_group, target_validation, target_test: the same
    of the target; bands, band names and group are the source's if not given. What neither validates nor tests trains,
    the source with its labels, the target's images without (``pairs``).
    pairs: give each tile of the source an image of the target, for domain adaptation; False for generalisation.
    normalisation: "measured" on the source's training split, or as stated, for both.
    classes, tile, overlap, batch_size (of pairs), workers, seed, augment: of both, as in ``FolderScenes``.
    """

    def __init__(
        self,
        *,
        images: str | Path,
        masks: str | Path,
        target_images: str | Path,
        target_masks: str | Path,
        classes: Sequence[str],
        label_values: Sequence[int | str | Sequence[int | str]] | None = None,
        ignore_value: int | str | Sequence[int | str] | None = None,
        bands: Sequence[int | str] | None = None,
        band_names: Sequence[str] | None = None,
        target_bands: Sequence[int | str] | None = None,
        target_band_names: Sequence[str] | None = None,
        layout: str | None = None,
        fill: float | None = None,
        tile: int | None = None,
        overlap: int = 0,
        group: str | None = None,
        target_group: str | None = None,
        validation: float | Sequence[str] = 0.2,
        test: float | Sequence[str] = 0.2,
        target_validation: float | Sequence[str] = 0.2,
        target_test: float | Sequence[str] = 0.2,
        pairs: bool = True,
        normalisation: str | Mapping[str, Sequence[float]] = "measured",
        batch_size: int = 2,
        workers: int = 0,
        seed: int = 0,
        augment: bool = True,
    ):
        both: dict[str, Any] = {
            "classes": classes, "label_values": label_values, "ignore_value": ignore_value, "layout": layout,
            "fill": fill, "tile": tile, "overlap": overlap, "batch_size": batch_size, "workers": workers, "seed": seed,
            "augment": augment,
        }  # fmt: skip
        source = FolderScenes(
            images=images, masks=masks, bands=bands, band_names=band_names, group=group, validation=validation,
            test=test, normalisation=normalisation, **both,
        )  # fmt: skip
        if target_bands and len(target_bands) != source.bands:
            raise RequestError(f"target_bands {list(target_bands)}: the source has {source.bands}; give as many")
        target = FolderScenes(
            images=target_images, masks=target_masks, bands=target_bands or bands,
            band_names=target_band_names or band_names, group=target_group or group, validation=target_validation,
            test=target_test, normalisation=_as(source), **both,
        )  # fmt: skip
        super().__init__(source, target, pairs)


class GeneratedDomains(Domains):
    """Two domains of generated scenes (see ``GeneratedScenes``): other biomes, under another sensor.

    count, target_count: scenes of each.  biomes, target_biomes: names out of ``landscape.BIOMES``.
    sensor: deviation of the gain (in its logarithm) and of the offset (in deviations of a band over the source) by
    which the target's sensor differs in each band, the same in all scenes; 0 for the same sensor.
    The other arguments are those of ``GeneratedScenes`` and ``FolderDomains``.
    """

    classes = CLASSES

    def __init__(
        self,
        *,
        count: int = 40,
        target_count: int = 40,
        size: int = 256,
        bands: Sequence[str] = BANDS,
        biomes: Sequence[str] = ("Forest", "GrassCrops", "Shrubland", "Urban"),
        target_biomes: Sequence[str] = ("Barren", "SnowIce", "Water", "Wetlands"),
        sensor: float = 0.2,
        validation: float | Sequence[str] = 0.2,
        test: float | Sequence[str] = 0.2,
        target_validation: float | Sequence[str] = 0.2,
        target_test: float | Sequence[str] = 0.2,
        pairs: bool = True,
        tile: int | None = None,
        overlap: int = 0,
        normalisation: str | Mapping[str, Sequence[float]] = "measured",
        batch_size: int = 2,
        workers: int = 0,
        seed: int = 0,
        augment: bool = True,
    ):
        both: dict[str, Any] = {
            "tile": tile, "overlap": overlap, "batch_size": batch_size, "workers": workers, "seed": seed,
            "augment": augment,
        }  # fmt: skip
        if sensor < 0:
            raise RequestError(f"sensor {sensor}: use 0 (the same) or a number above, such as 0.2")
        made = GeneratedSource(count, size, tuple(bands), seed, biomes=biomes)
        other = GeneratedSource(target_count, size, tuple(bands), seed, biomes=target_biomes, first=count)
        source = Scenes(
            made, made.names, CLASSES, validation=validation, test=test, normalisation=normalisation, **both
        )
        shifted = Resensed(other, sensor, seed, source.normalisation.std)
        target = Scenes(
            shifted, other.names, CLASSES, validation=target_validation, test=target_test, normalisation=_as(source),
            **both,
        )  # fmt: skip
        super().__init__(source, target, pairs)


class Resensed(_Reread):
    """Seen by another sensor: each band times a gain, plus an offset; drawn once by ``seed``.

    deviation: of each band, in which the offsets are.
    """

    def __init__(self, source: Source, strength: float, seed: int, deviation: Sequence[float]):
        super().__init__(source)
        random, bands = np.random.default_rng([seed, len(source.names)]), len(source.band_names)
        gain, offset = np.exp(random.normal(0, strength, bands)), random.normal(0, strength, bands) * deviation
        gain[np.array(source.band_names) == "tir1"] = 1  # kelvin are read too warm or too cold, not times a gain
        self._gain, self._offset = (part.astype(np.float32)[:, None, None] for part in (gain, offset))

    def read(self, index: int, window: Window) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        image, valid, mask = self._source.read(index, window)
        return np.where(valid, image * self._gain + self._offset, 0).astype(np.float32), valid, mask


def _as(source: Scenes) -> dict[str, list[float]]:
    """The source's normalisation, stated."""
    return {"mean": list(source.normalisation.mean), "std": list(source.normalisation.std)}
