"""Images with a mask each, split and normalised, as the loaders a task of binary segmentation is fed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from modalities.images.data.prepared import BAND_NAMES
from modalities.images.data.splits import SPLITS
from shared.errors import RequestError
from shared.normalisation import Moments, Normalisation, given
from shared.training.order import EpochSampler


class MaskSource(Protocol):
    """What holds the images."""

    names: list[str]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """An image uint8 (3, H, W) and its mask bool (H, W)."""
        ...


class MaskedImages:
    """What a task is fed: ``train()``, ``validation()``, ``test()`` loaders of one ``MaskSource``.

    A sample is ``{"image": float32 (3, size, size), "mask": int64 (H, W), "name": str}``; the mask is resized with its
    image in training and has its own size elsewhere, where a batch is one image, so that a score counts true pixels.

    classes: names of what is outside and inside the masks.  crop: share of each side that a training crop has.
    The other arguments are those of ``FolderMasks``. Images are first read when a loader or ``describe`` is asked for:
    then every one is, once, so that bad input shows before training does.
    """

    ignore_index, bands, band_names = 255, 3, BAND_NAMES[3]

    def __init__(
        self, source: MaskSource, classes: Sequence[str], *, validation: float | Sequence[str],
        test: float | Sequence[str], size: int, crop: float, flip: bool,
        normalisation: str | Mapping[str, Sequence[float]], batch_size: int, workers: int, seed: int,
    ):  # fmt: skip
        if size < 1 or batch_size < 1 or workers < 0 or seed < 0:
            settings = f"size {size}, batch_size {batch_size}, workers {workers} and seed {seed}"
            raise RequestError(f"{settings}: at least 1, 1, 0 and 0")
        if not 0 < crop <= 1:
            raise RequestError(f"crop {crop}: use a share of each side above 0, 1 for the whole image")
        if len(classes) != 2 or len(set(classes)) < 2:
            raise RequestError(f"classes {', '.join(classes)}: two names, of what is outside and inside the masks")
        self.classes, self.size, self.crop, self.flip = tuple(classes), size, crop, flip
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self.members = split(source.names, validation, test, seed)
        self._source = source
        named = isinstance(normalisation, str) and normalisation in ("backbone", "measured")
        self._kind = str(normalisation) if named else "given"
        self._stated = None if named else given(normalisation, self.band_names)

    def train(self) -> DataLoader:
        """Shuffled anew each epoch; order, crops and flips follow from the seed and the epoch alone."""
        return self._loader("train", EpochSampler(len(self.members["train"]), self.seed))

    def validation(self) -> DataLoader:
        """In the order of names, one image a batch."""
        return self._loader("validation")

    def test(self) -> DataLoader:
        """In the order of names, one image a batch."""
        return self._loader("test")

    def normalise_by(self, backbone: Any) -> None:
        """Take the statistics of the images ``backbone`` was trained on, where ``normalisation`` is "backbone"."""
        if self._kind != "backbone":
            return
        statistics = getattr(backbone, "statistics", None)
        if statistics is None:
            raise RequestError(f"data.normalisation backbone: {backbone.name} states no mean and deviation; "
                               "use measured, or give them")  # fmt: skip
        self.__dict__.pop("normalisation", None)
        self._stated = given({"mean": statistics[0], "std": statistics[1]}, self.band_names)

    @cached_property
    def normalisation(self) -> Normalisation:
        """As stated, or measured on the images that train. Raises RequestError before the backbone's are known."""
        if self._kind == "backbone" and self._stated is None:
            raise RequestError("data.normalisation backbone: no backbone was given (normalise_by); or use measured")
        if self._stated is not None:
            return self._stated
        total, *others = (self._survey[index][0] for index in self.members["train"])
        for moments in others:
            total += moments
        return total.normalisation(self.band_names)

    def describe(self) -> dict[str, Any]:
        """What was read, as JSON; ``size``, ``band_names`` and ``normalisation`` (of values from 0 to 255) are what it
        takes to feed a new image to a model trained on these."""
        return {
            "kind": type(self).__name__,
            "classes": list(self.classes),
            "band_names": list(self.band_names),
            "ignore_index": self.ignore_index,
            "size": self.size,
            "augmentation": {"crop": self.crop, "flip": self.flip},
            "seed": self.seed,
            "normalisation": {
                "kind": self._kind, "mean": list(self.normalisation.mean), "std": list(self.normalisation.std),
            },
            "splits": {
                part: {"images": len(chosen), "share": float(np.mean([self._survey[i][1] for i in chosen]))}
                for part, chosen in self.members.items() if chosen
            },
        }  # fmt: skip

    def display(self, image: Tensor | np.ndarray) -> np.ndarray:
        """A normalised image (3, H, W) as a picture, uint8 (H, W, 3)."""
        values = self.normalisation.undo(np.asarray(image, np.float32)).transpose(1, 2, 0)
        return np.clip(values.round(), 0, 255).astype(np.uint8)

    @cached_property
    def _survey(self) -> dict[int, tuple[Moments, float]]:
        """Every image is read once: its moments, and the share of its pixels inside the mask."""
        found = {}
        for index in sorted({i for chosen in self.members.values() for i in chosen}):
            image, mask = self._source.read(index)
            found[index] = (Moments.of(image.reshape(len(image), -1)), float(mask.mean()))
        return found

    def _loader(self, part: str, sampler: Any = None) -> DataLoader:
        if not self.members[part]:
            raise RequestError(f"there is no {part} split: ask for a fraction above 0, or name its images")
        self._survey  # noqa: B018
        # A generator of its own, so that loading leaves the global random state alone.
        return DataLoader(
            _Samples(self, self.members[part], sampler is not None),
            self.batch_size if sampler is not None else 1,
            sampler=sampler,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),
        )


class _Samples(Dataset):
    """The samples of a split. Position ``epoch * len + i`` is image i as epoch ``epoch`` crops and flips it."""

    def __init__(self, data: MaskedImages, members: Sequence[int], augment: bool):
        self.data, self.members, self.augment = data, list(members), augment

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, position: int) -> dict[str, Any]:
        data, (epoch, i) = self.data, divmod(position, len(self))
        image, mask = data._source.read(self.members[i])
        if self.augment:
            image, mask = cropped(image, mask, data.crop, data.flip, np.random.default_rng([data.seed, epoch, i]))
        pixels = resize(torch.from_numpy(np.ascontiguousarray(image)).float(), data.size)
        truth = torch.from_numpy(np.ascontiguousarray(mask)).long()
        if self.augment:
            truth = F.interpolate(truth[None, None].float(), (data.size,) * 2, mode="nearest-exact")[0, 0].long()
        scaled = torch.from_numpy(data.normalisation.apply(pixels.numpy()))
        return {"image": scaled, "mask": truth, "name": data._source.names[self.members[i]]}


def resize(image: Tensor, size: int) -> Tensor:
    """image float (C, H, W) to (C, size, size), whatever its shape was: bilinear, antialiased."""
    return F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0]


def cropped(
    image: np.ndarray, mask: np.ndarray, share: float, flip: bool, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A crop at a random place with this share of each side, mirrored half of the time where wanted."""
    size = [max(1, round(side * share)) for side in mask.shape]
    top, left = (int(random.integers(whole - part + 1)) for whole, part in zip(mask.shape, size, strict=True))
    window = (slice(top, top + size[0]), slice(left, left + size[1]))
    image, mask = image[:, *window], mask[window]
    return (image[..., ::-1], mask[..., ::-1]) if flip and random.random() < 0.5 else (image, mask)


def split(
    names: Sequence[str], validation: float | Sequence[str], test: float | Sequence[str], seed: int
) -> dict[str, list[int]]:
    """Indices of each split: named ones, then fractions of all (at least one) in an order drawn by the seed."""
    found: dict[str, list[int]] = {part: [] for part in SPLITS}
    place = {name: index for index, name in enumerate(names)}
    for part, wanted in (("test", test), ("validation", validation)):
        if isinstance(wanted, (int, float)):
            if not 0 <= wanted < 1:
                raise RequestError(f"{part} {wanted}: use a fraction from 0 to below 1, or names")
        elif unknown := [name for name in wanted if name not in place]:
            raise RequestError(f"{part}: no image is called {unknown[0]!r} (they are as {names[0]!r})")
        else:
            found[part] = sorted({place[name] for name in wanted})
    if both := set(found["test"]) & set(found["validation"]):
        raise RequestError(f"{names[min(both)]}: named for both validation and test")
    taken = {index for chosen in found.values() for index in chosen}
    free = [i for i in np.random.default_rng(seed).permutation(len(names)).tolist() if i not in taken]
    for part, wanted in (("test", test), ("validation", validation)):
        if isinstance(wanted, (int, float)) and wanted:
            count = max(1, round(wanted * len(names)))
            found[part], free = sorted(free[:count]), free[count:]
    if not free:
        raise RequestError(f"{len(names)} images: none is left to train on")
    return found | {"train": sorted(free)}
