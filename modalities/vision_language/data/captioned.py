"""Images with one or more captions each, split and normalised, as the loaders a retrieval task is fed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from modalities.images.data import Augmentation, Prepared, PreparedImages
from shared.errors import RequestError


class CaptionSource(Protocol):
    """What holds the images. captions: of each image, one or more."""

    names: list[str]
    captions: list[tuple[str, ...]]

    def read(self, index: int) -> np.ndarray:
        """uint8 (bands, H, W)."""
        ...


class ImagesWithCaptions(PreparedImages):
    """What a task is fed: ``train()``, ``validation()``, ``test()`` loaders of one ``CaptionSource``.

    A sample is ``{"image": float32 (bands, size, size), "captions": tuple of texts, "name": str}``: all captions, in
    training one, drawn anew each epoch by the seed. Of a batch, ``captions`` and ``name`` are lists.

    members: indices of each split.  settings: those of ``PreparedImages``.
    """

    _source: CaptionSource

    def __init__(self, source: CaptionSource, members: Mapping[str, Sequence[int]], **settings: Any):
        super().__init__(source, members, **settings)

    @property
    def captions(self) -> list[str]:
        """All captions of all splits."""
        chosen = {i for members in self.members.values() for i in members}
        return [caption for i in sorted(chosen) for caption in self._source.captions[i]]

    def samples(self, part: str, augment: Augmentation | None) -> Captioned:
        return Captioned(self._source, self.members[part], self.preparation, augment, self.seed, one=part == "train")

    def counted(self, part: str) -> dict[str, Any]:
        count = sum(len(self._source.captions[i]) for i in self.members[part])
        return super().counted(part) | {"captions": count}

    @staticmethod
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:  # type: ignore[override]
        """Images may have as many captions as they like."""
        lists = {key: [sample[key] for sample in samples] for key in ("captions", "name")}
        return {"image": torch.stack([sample["image"] for sample in samples]), **lists}


class Captioned(Prepared):
    """The samples of a split. one: a caption of each image, drawn for its epoch, in place of all."""

    source: CaptionSource

    def __init__(self, *arguments: Any, one: bool):
        super().__init__(*arguments)
        self.one = one

    def told(self, index: int, epoch: int, i: int) -> dict[str, Any]:
        captions = self.source.captions[index]
        if self.one:
            captions = (captions[np.random.default_rng([self.seed, epoch, i]).integers(len(captions))],)
        return {"captions": captions}


def drawn(total: int, shares: Mapping[str, float], seed: int) -> dict[str, list[int]]:
    """Indices below ``total`` of each split, in order: fractions of all, at least one unless 0; the others train.

    Raises RequestError where a fraction does not fit, or nothing is left to train on.
    """
    order = np.random.default_rng(seed).permutation(total).tolist()
    found: dict[str, list[int]] = {}
    for part, share in shares.items():
        if not 0 <= share < 1:
            raise RequestError(f"{part} {share}: use a fraction of the images from 0 to below 1")
        count = max(1, round(share * total)) if share else 0
        found[part], order = sorted(order[:count]), order[count:]
    if not order:
        raise RequestError(f"{total} images, all of them taken for {' and '.join(shares)}: none is left to train on")
    return {"train": sorted(order), **found}
