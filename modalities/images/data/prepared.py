"""Images brought to one size and normalised, as the loaders of three splits: what every data set of whole images is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from modalities.images.data.files import KINDS
from modalities.images.data.samples import Augmentation, Flip, Preparation, Readable
from modalities.images.data.splits import SPLITS
from shared.errors import RequestError
from shared.normalisation import Moments, Normalisation, given
from shared.training.order import EpochSampler

BAND_NAMES = {1: ("grey",), 3: ("red", "green", "blue")}


class PreparedImages:
    """``train()``, ``validation()``, ``test()`` loaders of one source of images. Subclasses give ``samples``.

    members: indices of each split.  The other arguments are those of ``ImageFolders``. Images are first read when a
    loader or ``describe`` is asked for: then every image is, once, so that bad input shows before training does.
    """

    collate: Callable[[list[Any]], Any] | None = None  # of samples to a batch; None: torch's own

    def __init__(
        self, source: Readable, members: Mapping[str, Sequence[int]], *, bands: int, size: int,
        crop: float, flip: Flip | None, normalisation: str | Mapping[str, Sequence[float]], batch_size: int,
        workers: int, seed: int,
    ):  # fmt: skip
        if bands not in KINDS:
            raise RequestError(f"bands {bands}: use 3 (RGB) or 1 (grey)")
        if size < 1 or batch_size < 1 or workers < 0 or seed < 0:
            settings = f"size {size}, batch_size {batch_size}, workers {workers} and seed {seed}"
            raise RequestError(f"{settings}: at least 1, 1, 0 and 0")
        if not 0 < crop <= 1:
            raise RequestError(f"crop {crop}: use a share of the area above 0, 1 for no random crop")
        if flip not in (None, "horizontal", "both"):
            raise RequestError(f"flip {flip!r}: use horizontal, both (vertical too) or null")
        self.bands, self.band_names = bands, BAND_NAMES[bands]
        self.size, self.batch_size, self.workers, self.seed = size, batch_size, workers, seed
        self.members = {part: list(members[part]) for part in SPLITS}
        self._source, self._augment = source, Augmentation(crop, flip)
        named = isinstance(normalisation, str) and normalisation in ("backbone", "measured")
        self._kind = str(normalisation) if named else "given"
        self._stated = None if named else given(normalisation, self.band_names)

    def samples(self, part: str, augment: Augmentation | None) -> Dataset:
        """Of a split; ``augment`` in training alone."""
        raise NotImplementedError(f"{type(self).__name__} has no samples")

    def counted(self, part: str) -> dict[str, Any]:
        """What ``describe`` says of a split."""
        return {"images": len(self.members[part])}

    def train(self) -> DataLoader:
        """Shuffled anew each epoch; order, crops and flips follow from the seed and the epoch alone."""
        return self._loader("train", EpochSampler(len(self.members["train"]), self.seed), self._augment)

    def validation(self) -> DataLoader:
        """In the order of names, as they are."""
        return self._loader("validation")

    def test(self) -> DataLoader:
        """In the order of names, as they are."""
        return self._loader("test")

    def normalise_by(self, backbone: Any) -> None:
        """Take the statistics of the images ``backbone`` was trained on, where ``normalisation`` is "backbone"."""
        if self._kind != "backbone":
            return
        statistics = getattr(backbone, "statistics", None)
        if statistics is None:
            name = getattr(backbone, "name", type(backbone).__name__)
            raise RequestError(f"data.normalisation backbone: {name} states no mean and deviation for "
                               f"{self.bands} bands; use measured, or give them")  # fmt: skip
        self.__dict__.pop("preparation", None)
        self._stated = given({"mean": statistics[0], "std": statistics[1]}, self.band_names)

    @cached_property
    def preparation(self) -> Preparation:
        """How an image is prepared outside training. Raises RequestError before the backbone's statistics are known."""
        if self._kind == "backbone" and self._stated is None:
            raise RequestError("data.normalisation backbone: no backbone was given (normalise_by); or use measured")
        return Preparation(self.size, self.bands, self._stated or self._measured())

    def describe(self) -> dict[str, Any]:
        """What was read, as JSON; ``size``, ``band_names`` and ``normalisation`` (of values from 0 to 255) are what it
        takes to feed a new file to a model trained on these (``Preparation.of``)."""
        self._read_all  # noqa: B018
        scale = self.preparation.normalisation
        return {
            "kind": type(self).__name__,
            "band_names": list(self.band_names),
            "size": self.size,
            "augmentation": {"crop": self._augment.crop, "flip": self._augment.flip},
            "seed": self.seed,
            "normalisation": {"kind": self._kind, "mean": list(scale.mean), "std": list(scale.std)},
            "splits": {part: self.counted(part) for part in SPLITS},
        }

    def display(self, image: Tensor | np.ndarray) -> np.ndarray:
        """A normalised image (bands, H, W) as a picture, uint8 (H, W, 3)."""
        values = self.preparation.normalisation.undo(np.asarray(image, np.float32))
        picture = np.broadcast_to(values, (3, *values.shape[1:])).transpose(1, 2, 0)
        return np.clip(picture.round(), 0, 255).astype(np.uint8)

    @cached_property
    def _read_all(self) -> list[Moments]:
        """Every image is read once; the moments of those that train, in their order."""
        moments: dict[int, Moments] = {}
        train = set(self.members["train"])
        for index in sorted({i for members in self.members.values() for i in members}):
            image = self._source.read(index)
            if index in train:
                moments[index] = Moments.of(image.reshape(self.bands, -1))
        return [moments[index] for index in self.members["train"]]

    def _measured(self) -> Normalisation:
        total, *others = self._read_all
        for moments in others:
            total += moments
        return total.normalisation(self.band_names)

    def _loader(self, part: str, sampler: Any = None, augment: Augmentation | None = None) -> DataLoader:
        if not self.members[part]:
            raise RequestError(f"there is no {part} split: ask for a fraction above 0, or name its images")
        self._read_all  # noqa: B018
        # A generator of its own, so that loading leaves the global random state alone.
        return DataLoader(
            self.samples(part, augment),
            self.batch_size,
            sampler=sampler,
            collate_fn=self.collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),
        )
