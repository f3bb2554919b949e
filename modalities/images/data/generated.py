"""Generated images: a shape or a texture on a shaded ground, in colours that tell nothing, made from a seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from modalities.images.data.classified import ClassifiedImages
from modalities.images.data.splits import draw
from shared.errors import RequestError

# How far a point (y, x), in units of the radius and turned with the shape, lies outside; negative inside.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda y, x: np.hypot(y, x) - 1,
    "square": lambda y, x: np.maximum(abs(y), abs(x)) - 0.9,
    "ring": lambda y, x: abs(np.hypot(y, x) - 0.75) - 0.25,
    "cross": lambda y, x: np.maximum(np.minimum(abs(y), abs(x)) - 0.25, np.maximum(abs(y), abs(x)) - 1),
    "stripes": lambda y, x: 0.5 * np.sin(3 * np.pi * y) + 0 * x,
    "checks": lambda y, x: 0.5 * np.sin(2 * np.pi * y) * np.sin(2 * np.pi * x),
}
CLASSES = ("disc", "square", "ring", "cross", "stripes", "checks")


class GeneratedImages(ClassifiedImages):
    """Discs, squares, rings and crosses, stripes and checks: of any place, size, turn and colour, over noise.

    count: images of each class.  classes: some of ``CLASSES``, in the order of their index.  side: pixels a side as
    generated.  seed: of the images too; None: the run's.  The other arguments are those of ``ImageFolders``.
    """

    classes = CLASSES

    def __init__(
        self,
        *,
        count: int = 40,
        classes: Sequence[str] = CLASSES,
        side: int = 48,
        validation: float | Literal["train"] = 0.2,
        test: float | Literal["rest"] = 0.2,
        per_class: int | None = None,
        bands: int = 3,
        size: int = 32,
        crop: float = 0.5,
        flip: Literal["horizontal", "both"] | None = "horizontal",
        normalisation: str | Mapping[str, Sequence[float]] = "backbone",
        batch_size: int = 16,
        workers: int = 0,
        seed: int | None = None,
    ):
        if count < 1 or side < 16:
            raise RequestError(f"count {count} and side {side}: at least 1 and 16")
        if len(classes) < 2 or len(set(classes)) < len(classes) or set(classes) - set(CLASSES):
            raise RequestError(f"classes {', '.join(classes)}: two or more out of {', '.join(CLASSES)}, each once")
        seed = seed or 0
        source = _Drawn(count, tuple(classes), side, bands, seed)
        members = draw(source.labels, classes, validation=validation, test=test, per_class=per_class, seed=seed)
        super().__init__(
            source, classes, members, bands=bands, size=size, crop=crop, flip=flip, normalisation=normalisation,
            batch_size=batch_size, workers=workers, seed=seed,
        )  # fmt: skip


class _Drawn:
    """The images as a ``Source``, each drawn anew when it is read."""

    def __init__(self, count: int, classes: tuple[str, ...], side: int, bands: int, seed: int):
        self.labels = [label for label in range(len(classes)) for _ in range(count)]
        self.names = [f"{classes[label]}/{index % count:04d}" for index, label in enumerate(self.labels)]
        self._classes, self._side, self._bands, self._seed = classes, side, bands, seed

    def read(self, index: int) -> np.ndarray:
        random = np.random.default_rng([self._seed, index])
        return draw_image(random, self._classes[self.labels[index]], self._side, self._bands)


def draw_image(random: np.random.Generator, kind: str, side: int, bands: int = 3) -> np.ndarray:
    """One image of a class, uint8 (bands, side, side)."""
    rows, columns = (np.mgrid[:side, :side] + 0.5) / side
    textured = kind in ("stripes", "checks")
    radius = random.uniform(0.3, 0.45) if textured else random.uniform(0.2, 0.38)
    down, across = (random.uniform(0, 1) if textured else random.uniform(0.4, 0.6) for _ in range(2))
    turn = random.uniform(0, 2 * np.pi)
    y, x = (rows - down) / radius, (columns - across) / radius
    y, x = y * np.cos(turn) - x * np.sin(turn), y * np.sin(turn) + x * np.cos(turn)
    inside = np.clip(0.5 - SHAPES[kind](y, x) * radius * side, 0, 1)  # edges are soft over one pixel
    ground, figure = _colours(random, bands)
    shade = 1 + 0.3 * ((rows - 0.5) * random.uniform(-1, 1) + (columns - 0.5) * random.uniform(-1, 1))
    image = (ground * (1 - inside) + figure * inside) * shade + random.normal(0, 8, (bands, side, side))
    return image.clip(0, 255).astype(np.uint8)


def _colours(random: np.random.Generator, bands: int) -> tuple[np.ndarray, np.ndarray]:
    """Of ground and figure, (bands, 1, 1) each: any two, of which one is lighter in every band."""
    dark = random.uniform(60, 110) + random.uniform(-30, 30, (bands, 1, 1))
    light = dark + random.uniform(60, 100) + random.uniform(-20, 20, (bands, 1, 1))
    return (dark, light) if random.random() < 0.5 else (light, dark)
