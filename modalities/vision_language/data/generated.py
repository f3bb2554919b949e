"""Generated images with captions: a coloured shape on a coloured ground, told in words, made from a seed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from modalities.images.data import SHAPES
from modalities.vision_language.data.captioned import ImagesWithCaptions, drawn
from shared.errors import RequestError

FIGURES = ("disc", "square", "ring", "cross")
RADIUS = {"small": 0.2, "large": 0.42}  # of the side
COLOURS = {
    "red": (205, 45, 40), "green": (50, 160, 60), "blue": (45, 75, 200), "yellow": (225, 205, 50),
    "white": (235, 235, 235), "black": (25, 25, 25),
}  # fmt: skip
ALL = [
    (size, figure, *pair)
    for size in RADIUS
    for figure in FIGURES
    for pair in itertools.permutations(COLOURS, 2)
]  # fmt: skip


class GeneratedCaptions(ImagesWithCaptions):
    """Discs, squares, rings and crosses, small and large, in six colours on five others; no two images are told alike.

    Each has two captions: "a large red disc on a blue ground" and "blue ground, and on it a large red disc".

    count: images, at most 240.  side: pixels a side as generated.  seed: of the images too; None: the run's.
    The other arguments are those of ``CaptionedFolder``.
    """

    bands = 3

    def __init__(
        self,
        *,
        count: int = 120,
        side: int = 32,
        validation: float = 0.1,
        test: float = 0.2,
        size: int = 32,
        crop: float = 0.9,
        flip: Literal["horizontal", "both"] | None = None,
        normalisation: str | Mapping[str, Sequence[float]] = "backbone",
        batch_size: int = 32,
        workers: int = 0,
        seed: int | None = None,
    ):
        if not 3 <= count <= len(ALL) or side < 16:
            raise RequestError(f"count {count} and side {side}: 3 to {len(ALL)}, and at least 16")
        seed = seed or 0
        source = _Drawn(count, side, seed)
        super().__init__(
            source, drawn(count, {"test": test, "validation": validation}, seed), bands=3, size=size, crop=crop,
            flip=flip, normalisation=normalisation, batch_size=batch_size, workers=workers, seed=seed,
        )  # fmt: skip


class _Drawn:
    """The images as a ``CaptionSource``, each drawn anew when it is read."""

    def __init__(self, count: int, side: int, seed: int):
        order = np.random.default_rng([seed, len(ALL)]).permutation(len(ALL))[:count]
        self._told = [ALL[i] for i in order]
        self.names = [f"{index:04d}" for index in range(count)]
        self.captions = [
            (
                f"a {size} {colour} {figure} on a {ground} ground",
                f"{ground} ground, and on it a {size} {colour} {figure}",
            )
            for size, figure, colour, ground in self._told
        ]
        self._side, self._seed = side, seed

    def read(self, index: int) -> np.ndarray:
        size, figure, colour, ground = self._told[index]
        random = np.random.default_rng([self._seed, index])
        rows, columns = (np.mgrid[: self._side, : self._side] + 0.5) / self._side
        radius, (down, across) = RADIUS[size], random.uniform(0.45, 0.55, 2)
        inside = SHAPES[figure]((rows - down) / radius, (columns - across) / radius)
        cover = np.clip(0.5 - inside * radius * self._side, 0, 1)  # edges are soft over one pixel
        front, back = (np.array(COLOURS[name], float)[:, None, None] for name in (colour, ground))
        image = back * (1 - cover) + front * cover + random.normal(0, 8, (3, self._side, self._side))
        return image.clip(0, 255).astype(np.uint8)
