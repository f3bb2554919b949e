"""TorchGeo: its datasets and samplers that yield an image and a mask (Stewart et al., SIGSPATIAL 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Subset

from modalities.remote_sensing.data.composites import shown
from modalities.remote_sensing.data.files import choose
from modalities.remote_sensing.data.splits import SPLITS, split_scenes
from modalities.remote_sensing.data.statistics import Survey, measured
from modalities.remote_sensing.data.torchgeo_naming import build_dataset, build_sampler, installed
from modalities.remote_sensing.data.torchgeo_samples import Part, Reader, Samples, drawn_by, shared_ground
from shared.errors import RequestError
from shared.normalisation import Moments, Normalisation, given
from shared.rasters import IGNORE, Labels


class TorchGeo:
    """Datasets of TorchGeo whose samples hold ``image`` (bands, H, W) and ``mask`` (H, W) or (1, H, W).

    datasets: one for all splits, or ``{train: ..., validation: ..., test: ...}``. Each is an object or, in a recipe,
        ``{type: LandCoverAI, root: data, split: train}``: a class of ``torchgeo.datasets`` (or a dotted name) and its
        settings, where a value may again be a dataset: ``{type: IntersectionDataset, dataset1: {type: ...}, ...}``.
    samplers: ``{train: ..., validation: ..., test: ...}`` for a GeoDataset, which is read by place: an object or, in a
        recipe, ``{type: RandomGeoSampler, size: 64, length: 500, roi: [xmin, ymin, xmax, ymax]}``. Samplers of batches
        will do. One for validation or test is passed once, and its windows are kept, so that scores compare.
    classes, label_values, ignore_value, normalisation, batch_size, workers, seed, augment: as in ``FolderScenes``.
    bands: which of the image's, by name or by number from 1 (all if not given).  band_names: names of all of them (the
        dataset's own ``bands`` or ``all_bands`` if it names that many).
    fill: a pixel whose bands all hold this value has no data. Pixels off the ground a GeoDataset or ``roi`` covers,
        which TorchGeo fills with zeros, never count.
    validation, test: fractions of the train dataset's samples, drawn by ``seed``, where ``datasets`` gives no
        validation or test and the dataset is read by number. Neighbouring chips may then stand on both sides.
    file_values: samples hold the values and bands of files unchanged, so that ``predict`` may read files alike.

    Every sample is read once before training, training's for the normalisation ("measured": one pass of its sampler).
    Raises RequestError in one line where TorchGeo is absent, a setting is not its class's, a GeoDataset has no sampler
    of places or another dataset has one, train and another split share most of their ground, and for what ``Reader``
    refuses.
    """

    ignore_index = IGNORE

    def __init__(
        self,
        *,
        datasets: Any,
        classes: Sequence[str],
        samplers: Mapping[str, Any] | None = None,
        label_values: Sequence[int | Sequence[int]] | None = None,
        ignore_value: int | Sequence[int] | None = None,
        bands: Sequence[int | str] | None = None,
        band_names: Sequence[str] | None = None,
        fill: float | None = None,
        validation: float = 0.2,
        test: float = 0.2,
        normalisation: str | Mapping[str, Sequence[float]] = "measured",
        file_values: bool = False,
        batch_size: int = 8,
        workers: int = 0,
        seed: int = 0,
        augment: bool = True,
    ):
        if len(set(classes)) < len(classes) or not 2 <= len(classes) <= IGNORE:
            raise RequestError(f"classes {tuple(classes)}: 2 to {IGNORE} different names")
        if batch_size < 1 or workers < 0 or seed < 0:
            raise RequestError(f"batch_size {batch_size}, workers {workers} and seed {seed}: at least 1, 0 and 0")
        installed()
        self.classes, self.batch_size, self.workers, self.seed = tuple(classes), batch_size, workers, seed
        self.augment, self.file_values = augment, file_values
        made = _datasets(datasets)
        chosen = _samplers(samplers or {}, made, batch_size)
        self._parts = _parts(made, chosen, {"validation": validation, "test": test}, seed)
        self.shared = _apart(self._parts)
        self._reader = Reader(Labels(classes, label_values, ignore_value), fill)
        first = self._parts["train"]
        self._reader.read(first, first.keys[0])
        self.file_bands = tuple(band_names or _names(first.dataset, self._reader.channels or 0))
        numbers = list(range(1, (self._reader.channels or 0) + 1))
        self._reader.numbers, self.band_names = choose(_kind(first.dataset), numbers, self.file_bands, bands)
        self.bands = len(self.band_names)
        self._given = None if normalisation == "measured" else given(normalisation, self.band_names)

    def train(self) -> DataLoader:
        """In the order of the sampler, or shuffled anew each epoch."""
        sampler = self._parts["train"].sampler
        if sampler is None:
            return self._loader("train", batch_size=self.batch_size, shuffle=True)
        return self._loader("train", **_order(sampler, self.batch_size))

    def validation(self) -> DataLoader:
        """In the order of the dataset, or of one pass of the sampler."""
        return self._loader("validation", batch_size=self.batch_size)

    def test(self) -> DataLoader:
        """In the order of the dataset, or of one pass of the sampler."""
        return self._loader("test", batch_size=self.batch_size)

    @cached_property
    def normalisation(self) -> Normalisation:
        """As stated, or measured on the valid pixels of one pass through the training split."""
        return self._given or measured([self._surveys["train"]], self.band_names)

    def describe(self) -> dict[str, Any]:
        """What was read, as JSON; see ``Scenes.describe``. ``shared_with_train``: share of a split's ground."""
        reading = {"reading": {"bands": self._reader.numbers, "fill": self._reader.fill}} if self.file_values else {}
        return {
            "kind": type(self).__name__,
            "classes": list(self.classes),
            "band_names": list(self.band_names),
            "file_bands": list(self.file_bands),
            "ignore_index": self.ignore_index,
            "window": min(self._reader.size or (0,)),
            "augment": self.augment,
            **reading,
            "seed": self.seed,
            "normalisation": {
                "kind": "given" if self._given else "measured",
                "mean": list(self.normalisation.mean),
                "std": list(self.normalisation.std),
            },
            "splits": {name: self._describe(part) for name, part in self._parts.items()},
        }

    def displays(self, image: Tensor | np.ndarray) -> dict[str, np.ndarray]:
        """A normalised image (bands, H, W) as pictures, uint8 (H, W, 3), by name (see ``composites``)."""
        return shown(image, self.normalisation, self.band_names)

    def _describe(self, part: Part) -> dict[str, Any]:
        return {
            "dataset": _kind(part.dataset),
            "sampler": part.sampler and type(part.sampler).__name__,
            "samples": len(part.keys),
            "pixels": dict(zip((*self.classes, "ignored"), self._surveys[part.name].pixels, strict=True)),
            **({"shared_with_train": self.shared[part.name]} if part.name in self.shared else {}),
        }

    @cached_property
    def _surveys(self) -> dict[str, Survey]:
        return {name: self._survey(part) for name, part in self._parts.items()}

    def _survey(self, part: Part) -> Survey:
        """One pass through a split, read whole."""
        moments, pixels = Moments.of(np.zeros((self.bands, 0))), np.zeros(IGNORE + 1, np.int64)
        with drawn_by(self.seed):
            for key in part.keys:
                image, valid, mask = self._reader.read(part, key)
                moments += Moments.of(image[:, valid])
                pixels += np.bincount(mask.ravel(), minlength=IGNORE + 1)
        if not pixels[: len(self.classes)].sum():
            raise RequestError(f"no pixel of the {part.name} split has a label: every one is invalid or ignored")
        return Survey(moments, (*pixels[: len(self.classes)].tolist(), int(pixels[IGNORE])))

    def _loader(self, name: str, **order: Any) -> DataLoader:
        training = name == "train"
        _ = self._surveys  # bad input shows before training does
        samples = Samples(
            self._reader, self._parts[name], self.normalisation,
            fixed=not training or self._parts[name].sampler is None, augment=self.augment and training,
        )  # fmt: skip
        return DataLoader(
            samples,
            **order,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),
        )


def _datasets(stated: Any) -> dict[str, Any]:
    """The datasets by split; one for all of them stands under train alone."""
    if not isinstance(stated, Mapping) or "type" in stated:
        return {"train": build_dataset(stated, "datasets")}
    if "train" not in stated or set(stated) - set(SPLITS):
        raise RequestError(f"datasets: wants one with its type, or train, validation and test; got {', '.join(stated)}")
    return {name: build_dataset(value, f"datasets.{name}") for name, value in stated.items()}


def _samplers(stated: Mapping[str, Any], datasets: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """The samplers by split, each of the kind its dataset is read by."""
    from torchgeo.datasets import GeoDataset
    from torchgeo.samplers import BatchGeoSampler, GeoSampler

    if set(stated) - set(SPLITS):
        raise RequestError(f"samplers: wants train, validation and test; got {', '.join(map(str, stated))}")
    made = {}
    for name in SPLITS:
        dataset, path = datasets.get(name, datasets["train"]), f"samplers.{name}"
        by_place = isinstance(dataset, GeoDataset)
        if by_place and name not in stated:
            hint = "RandomGeoSampler" if name == "train" else "GridGeoSampler"
            raise RequestError(f"{path}: {_kind(dataset)} is read by place: give a sampler, such as {hint}")
        if isinstance(stated.get(name), Mapping) and not by_place:
            raise RequestError(f"{path}: {_kind(dataset)} is read by number, the samplers of TorchGeo give places")
        if name in stated:
            made[name] = build_sampler(stated[name], path, dataset, batch_size)
        if name in made and isinstance(made[name], (GeoSampler, BatchGeoSampler)) != by_place:
            gives, read = ("numbers", "place") if by_place else ("places", "number")
            raise RequestError(f"{path}: {_kind(made[name])} gives {gives}, but {_kind(dataset)} is read by {read}")
    return made


def _parts(
    datasets: Mapping[str, Any], samplers: Mapping[str, Any], shares: Mapping[str, float], seed: int
) -> dict[str, Part]:
    """What each split is read from."""
    from torchgeo.datasets import GeoDataset

    whole, drawn = datasets["train"], dict(datasets)
    absent = [name for name in SPLITS if name not in datasets]
    if absent and not isinstance(whole, GeoDataset):
        if samplers:
            raise RequestError(f"samplers: {', '.join(absent)} is drawn from train, so give none, or datasets for all")
        numbers = [f"{number:09d}" for number in range(len(whole))]
        split = split_scenes(numbers, seed=seed, **{n: shares[n] if n in absent else 0.0 for n in SPLITS[1:]})
        drawn |= {name: Subset(whole, [int(n) for n in getattr(split, name)]) for name in ("train", *absent)}
    parts = {}
    for name in SPLITS:
        dataset, sampler = drawn.get(name, whole), samplers.get(name)
        keys = list(range(len(dataset))) if sampler is None else _one_pass(sampler, name, seed)
        if not keys:
            cause = "the dataset is empty" if sampler is None else "its size is above the ground's, or its length 0"
            raise RequestError(f"the {name} split has no sample: {cause}")
        parts[name] = Part(name, dataset, sampler, keys, getattr(sampler, "index", None))
    return parts


def _one_pass(sampler: Any, name: str, seed: int) -> list[Any]:
    """All keys of one pass, drawn by the seed."""
    before = getattr(sampler, "generator", None)
    if before is not None:
        sampler.generator = torch.Generator().manual_seed(seed)
    try:
        with drawn_by(seed):
            keys = list(sampler)
    except (RuntimeError, ValueError, IndexError) as error:  # a random sampler without any place to draw from
        raise RequestError(
            f"samplers.{name}: {_kind(sampler)} gives no place: {' '.join(str(error).split())}"
        ) from error
    finally:
        if before is not None:
            sampler.generator = before
    return [key for batch in keys for key in batch] if _gives_batches(sampler) else keys


def _gives_batches(sampler: Any) -> bool:
    from torchgeo.samplers import BatchGeoSampler

    return isinstance(sampler, (BatchGeoSampler, BatchSampler))


def _order(sampler: Any, batch_size: int) -> dict[str, Any]:
    if _gives_batches(sampler):
        return {"batch_sampler": sampler}
    return {"sampler": sampler, "batch_size": batch_size}


def _apart(parts: Mapping[str, Part]) -> dict[str, float]:
    """The share of each split's ground that training has too; refuses more than half of it."""
    train, shares = parts["train"], {}
    for name in SPLITS[1:]:
        if train.ground is None or parts[name].ground is None:
            continue
        shares[name] = round(shared_ground(train.ground, parts[name].ground), 4)
        if shares[name] > 0.5:
            raise RequestError(
                f"samplers: {shares[name]:.0%} of the ground of {name} is in train too; give each a roi or a dataset"
            )
    return shares


def _names(dataset: Any, channels: int) -> Sequence[str]:
    """What a dataset calls the bands of its images, numbers where it does not say."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    for place in (dataset, *getattr(dataset, "datasets", ())):
        for attribute in ("bands", "all_bands"):
            names = getattr(place, attribute, None)
            if isinstance(names, (list, tuple)) and len(names) == channels and all(isinstance(n, str) for n in names):
                return names
    return [f"band {number}" for number in range(1, channels + 1)]


def _kind(thing: Any) -> str:
    while isinstance(thing, Subset):
        thing = thing.dataset
    return type(thing).__name__
