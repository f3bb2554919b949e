"""Samples of TorchGeo: each read, checked, and brought to what a segmentation task is fed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from modalities.remote_sensing.data.samples import turned
from shared.errors import RequestError
from shared.normalisation import Normalisation
from shared.rasters import Labels


class Part(NamedTuple):
    """What one split is read from. dataset: TorchGeo's.  sampler: of training, None for a random order of ``keys``.
    keys: all that is read in one pass.  ground: the places (a GeoDataFrame) that count, None without any."""

    name: str
    dataset: Any
    sampler: Any
    keys: list[Any]
    ground: Any


class Reader:
    """Reads a split's samples. labels: of mask values.  fill: as in ``FolderScenes``.

    The first sample read sets the number of channels; ``numbers`` (from 1) are those kept, all while it is None.
    """

    def __init__(self, labels: Labels, fill: float | None):
        self.labels, self.fill = labels, fill
        self.channels: int | None = None
        self.size: tuple[int, int] | None = None
        self.numbers: list[int] | None = None

    def read(self, part: Part, key: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """image float32 (bands, H, W), valid bool (H, W), mask int64 (H, W) of class indices or IGNORE.

        Raises RequestError that names the split and the place in it: no image or no mask, another number of channels
        or another size than the first sample's, sizes of image and mask that differ, NaN, a label of no class.
        """
        name = name_of(part, key)
        image, mask = self._arrays(part, key, name)
        self.channels, self.size = self.channels or len(image), self.size or mask.shape
        if len(image) != self.channels:
            raise RequestError(f"{name}: the image has {len(image)} bands, the first sample {self.channels}")
        if mask.shape != self.size:
            raise RequestError(
                f"{name}: {_pixels(mask.shape)}, the first sample has {_pixels(self.size)}; batches need one size: "
                "crop in the dataset's transforms or choose another sampler"
            )
        valid = np.ones(mask.shape, bool) if part.ground is None else covered(part.ground, key, mask.shape)
        if self.numbers is not None:
            image = image[[number - 1 for number in self.numbers]]
        if self.fill is not None:
            valid &= (image != np.float32(self.fill)).any(0)
        if holes := int((~np.isfinite(image).all(0) & valid).sum()):
            raise RequestError(f"{name}: the image holds NaN or infinity in {holes} pixels; fill or mask them")
        image = np.where(valid, image, np.float32(0))
        return image, valid, self.labels.index(name, mask, valid)

    def _arrays(self, part: Part, key: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
        """image float32 (channels, H, W), mask int64 (H, W) as stored"""
        try:
            sample = part.dataset[key]
        except Exception as error:  # whatever a dataset finds wrong with its files
            what = " ".join(str(error).split()) or type(error).__name__
            raise RequestError(f"{name}: {type(part.dataset).__name__} cannot read it: {what}") from error
        if not isinstance(sample, Mapping) or "image" not in sample or "mask" not in sample:
            has = f"has {', '.join(map(str, sample))}" if isinstance(sample, Mapping) else f"is {type(sample).__name__}"
            lacks = "image" if isinstance(sample, Mapping) and "image" not in sample else "mask"
            raise RequestError(f"{name}: {type(part.dataset).__name__} yields no {lacks}: a sample {has}")
        image, mask = torch.as_tensor(sample["image"]), torch.as_tensor(sample["mask"])
        if image.ndim != 3 or image.is_complex():
            raise RequestError(f"{name}: image {image.dtype} {tuple(image.shape)}; it has shape (bands, H, W)")
        mask = mask[0] if mask.ndim == 3 and len(mask) == 1 else mask
        if mask.ndim != 2:
            raise RequestError(f"{name}: mask of shape {tuple(mask.shape)}; it has shape (H, W) or (1, H, W)")
        if mask.shape != image.shape[1:]:
            sizes = f"image {_pixels(image.shape[1:])}, mask {_pixels(mask.shape)}"
            raise RequestError(f"{name}: {sizes}; a mask has its image's size")
        if mask.is_floating_point() and not torch.equal(mask, mask.round()):
            raise RequestError(f"{name}: the mask holds fractions or NaN; classes are whole numbers")
        return image.to(torch.float32).numpy(), mask.to(torch.int64).numpy()


class Samples(Dataset):
    """A split's samples for a loader. fixed: a key is a position among ``part.keys``, else one of the dataset's own.

    augment: one of the flips and quarter turns, drawn from torch's random numbers.
    """

    def __init__(self, reader: Reader, part: Part, normalisation: Normalisation, *, fixed: bool, augment: bool):
        self.reader, self.part, self.normalisation = reader, part, normalisation
        self.fixed, self.augment = fixed, augment

    def __len__(self) -> int:
        return len(self.part.keys)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        key = self.part.keys[key] if self.fixed else key
        image, valid, mask = self.reader.read(self.part, key)
        image = self.normalisation.apply(image, valid)
        if self.augment:
            image, mask = turned(image, mask, np.random.default_rng(int(torch.randint(2**31, ()))))
        return {
            "image": _tensor(image),
            "mask": _tensor(mask),
            "name": name_of(self.part, key),
        }


def covered(ground: Any, key: Sequence[slice], shape: tuple[int, int]) -> np.ndarray:
    """bool (H, W): which pixels of the window ``key`` = (x, y, t) have their centre on the ground at that time.

    TorchGeo's grids go over the edge of a raster, and what they find there is filled with zeros.
    """
    from rasterio import Affine
    from rasterio.features import geometry_mask

    x, y, time = key
    near = ground[ground.index.overlaps(_interval(time.start, time.stop))].cx[x.start : x.stop, y.start : y.stop]
    if near.empty:
        return np.zeros(shape, bool)
    width, height = (x.stop - x.start) / shape[1], (y.stop - y.start) / shape[0]
    place = Affine(width, 0, x.start, 0, -height, y.stop)
    return geometry_mask(near.geometry, shape, place, invert=True)


def shared_ground(train: Any, other: Any) -> float:
    """The share of the ground of ``other`` that ``train`` (both GeoDataFrames) holds at the same time."""
    times = _interval(other.index.left.min(), other.index.right.max(), closed="neither")
    mine = train[train.index.overlaps(times)].geometry.union_all()
    theirs = other.to_crs(train.crs).geometry.union_all()
    return theirs.intersection(mine).area / theirs.area if theirs.area else 0.0


@contextmanager
def drawn_by(seed: int) -> Iterator[None]:
    """Within it random numbers of torch, NumPy and Python follow from the seed; after it they are as they were."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def name_of(part: Part, key: Any) -> str:
    """A sample in words: its split and number, or its upper left corner."""
    if part.ground is None:
        return f"{part.name} {key}"
    return f"{part.name} x={key[0].start:.10g} y={key[1].stop:.10g}"


def _interval(start: Any, end: Any, closed: Any = "both") -> Any:
    import pandas

    return pandas.Interval(start, end, closed=closed)


def _pixels(size: Sequence[int]) -> str:
    return " x ".join(map(str, size)) + " pixels"


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
