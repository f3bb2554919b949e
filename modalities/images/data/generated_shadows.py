"""Generated shadows: ground in patches of many colours, some of them dark, and shadows cast across, from a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from modalities.images.data.generated import SHAPES
from modalities.images.data.masked import MaskedImages
from shared.errors import RequestError

CAST = ("disc", "square", "ring", "cross")


class GeneratedShadows(MaskedImages):
    """Shadows of discs, squares, rings and crosses; dark patches of ground are there to be mistaken for them.

    count: images.  side: pixels a side as generated.  seed: of the images too; None: the run's.
    The other arguments are those of ``FolderMasks``.
    """

    classes = ("light", "shadow")

    def __init__(
        self,
        *,
        count: int = 40,
        side: int = 96,
        validation: float | Sequence[str] = 0.2,
        test: float | Sequence[str] = 0.2,
        size: int = 96,
        crop: float = 0.9,
        flip: bool = True,
        normalisation: str | Mapping[str, Sequence[float]] = "backbone",
        batch_size: int = 4,
        workers: int = 0,
        seed: int | None = None,
    ):
        if count < 3 or side < 16:
            raise RequestError(f"count {count} and side {side}: at least 3 and 16")
        super().__init__(
            _Cast(count, side, seed or 0), self.classes, validation=validation, test=test, size=size, crop=crop,
            flip=flip, normalisation=normalisation, batch_size=batch_size, workers=workers, seed=seed or 0,
        )  # fmt: skip


class _Cast:
    """The images as a ``MaskSource``, each drawn anew when it is read."""

    def __init__(self, count: int, side: int, seed: int):
        self.names = [f"{index:04d}" for index in range(count)]
        self._side, self._seed = side, seed

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return draw(np.random.default_rng([self._seed, index]), self._side)


def draw(random: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """One image uint8 (3, side, side) and the mask bool (side, side) of its shadows.

    Shade leaves a third to a half of the light, bluer than the rest; its mask is where most of the light is gone.
    """
    ground = np.broadcast_to(_colour(random), (3, side, side)).copy()
    for _ in range(4):
        inside = _inside(random, "square", side, 0.1, 0.25)
        ground = ground * (1 - inside) + _colour(random) * inside
    shade = np.zeros((side, side))
    for _ in range(int(random.integers(1, 3))):
        shade = np.maximum(shade, _inside(random, str(random.choice(CAST)), side, 0.15, 0.3))
    left = random.uniform(0.3, 0.5) * np.array([0.9, 1.0, 1.15])[:, None, None]
    image = ground * (1 - shade * (1 - left)) * random.uniform(0.9, 1.1) + random.normal(0, 4, ground.shape)
    return image.clip(0, 255).astype(np.uint8), shade > 0.5


def _colour(random: np.random.Generator) -> np.ndarray:
    return random.uniform(60, 220) + random.uniform(-25, 25, (3, 1, 1))


def _inside(random: np.random.Generator, kind: str, side: int, smallest: float, largest: float) -> np.ndarray:
    """How much of each pixel (side, side) lies in a shape of random place, turn and size; edges are soft."""
    rows, columns = (np.mgrid[:side, :side] + 0.5) / side
    radius, turn = random.uniform(smallest, largest), random.uniform(0, 2 * np.pi)
    y, x = (rows - random.uniform(0.2, 0.8)) / radius, (columns - random.uniform(0.2, 0.8)) / radius
    y, x = y * np.cos(turn) - x * np.sin(turn), y * np.sin(turn) + x * np.cos(turn)
    return np.clip(0.5 - SHAPES[kind](y, x) * radius * side, 0, 1)
