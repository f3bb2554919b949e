"""Labelled images, split and normalised, as the loaders a classification task is fed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modalities.images.data.prepared import PreparedImages
from modalities.images.data.samples import Augmentation, Images, Source


class ClassifiedImages(PreparedImages):
    """What a task is fed: ``train()``, ``validation()``, ``test()`` loaders of one ``Source`` of labelled images.

    A sample is ``{"image": float32 (bands, size, size), "label": int, "name": str}``.

    members: indices of each split.  settings: those of ``PreparedImages``.
    """

    _source: Source

    def __init__(self, source: Source, classes: Sequence[str], members: Mapping[str, Sequence[int]], **settings: Any):
        super().__init__(source, members, **settings)
        self.classes = tuple(classes)

    def samples(self, part: str, augment: Augmentation | None) -> Images:
        return Images(self._source, self.members[part], self.preparation, augment, self.seed)

    def describe(self) -> dict[str, Any]:
        """As ``PreparedImages.describe``, with the classes."""
        return {"kind": type(self).__name__, "classes": list(self.classes), **super().describe()}

    def counted(self, part: str) -> dict[str, Any]:
        counts = np.bincount([self._source.labels[i] for i in self.members[part]], minlength=len(self.classes))
        return super().counted(part) | {"by_class": dict(zip(self.classes, counts.tolist(), strict=True))}
