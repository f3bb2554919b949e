"""Images of a folder or a table, with a class each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modalities.images.data.classified import ClassifiedImages
from modalities.images.data.files import read_image
from modalities.images.data.listing import Item, class_names, composed, index_of, listed
from modalities.images.data.splits import draw
from shared.errors import RequestError


class ImageFolders(ClassifiedImages):
    """PNG, JPEG, TIFF and WebP files, a folder for each class, or a table of path and label."""

    def __init__(
        self,
        *,
        root: Path,
        classes: Sequence[str] | None = None,
        validation: float | Literal["train"] | Path = 0.2,
        test: float | Literal["rest"] | Path = 0.2,
        per_class: int | None = None,
        bands: int = 3,
        size: int = 224,
        crop: float = 0.5,
        flip: Literal["horizontal", "both"] | None = "horizontal",
        normalisation: str | Mapping[str, Sequence[float]] = "backbone",
        batch_size: int = 32,
        workers: int = 0,
        seed: int | None = None,
    ):
        """
        Args:
            root: a folder ``<class>/**/<image>``, or a .csv file with the columns path (from its folder) and label.
            classes: names in the order of their index; None: those found, sorted. A table may give indices instead.
            validation: a fraction of each class, at least one image; a .txt file that names images of ``root``, one a
                line; another folder or .csv file of the same classes; or "train": the images that train, as they are,
                for where there are too few to spare any (then the best state says nothing: check once, at the end).
            test: a fraction, a .txt file or another folder or table likewise; or "rest": all images that ``per_class``
                leaves.
            per_class: images of each class that train, drawn by the seed (few-shot); None: all.
            bands: 3 for RGB, 1 for grey; a file with other channels is an error.
            size: pixels a side of what the model sees.
            crop: least share of the area that a training crop takes, 1 for the middle square.
            flip: in training.
            normalisation: "backbone" (the statistics its weights were trained with), "measured" (on the images that
                train), or {mean: [...], std: [...]} of each band in values from 0 to 255.
            batch_size: images.  workers: processes that read.
            seed: of the draws, the order and the augmentation; None: the run's.

        Raises RequestError, in one line that names the file, where something is wrong with the images or their classes.
        """
        root, seed = Path(root), seed or 0
        items = listed(root)
        names = class_names(items, root, classes)
        pools: dict[str, list[int]] = {}
        shares: dict[str, Any] = {"validation": validation, "test": test}
        for part, wanted in shares.items():
            if isinstance(wanted, Path) or (isinstance(wanted, str) and wanted not in ("train", "rest")):
                shares[part], pools[part] = 0.0, _stated(Path(wanted), part, items, root)
        labels = [index_of(item, names) for item in items]
        if both := set(pools.get("validation", ())) & set(pools.get("test", ())):
            raise RequestError(f"{items[min(both)].file}: named for both validation and test")
        members = _split(labels, names, pools, shares, per_class, seed)
        super().__init__(
            _Files(items, labels, bands), names, members, bands=bands, size=size, crop=crop, flip=flip,
            normalisation=normalisation, batch_size=batch_size, workers=workers, seed=seed,
        )  # fmt: skip


class _Files:
    """The files as a ``Source``."""

    def __init__(self, items: Sequence[Item], labels: list[int], bands: int):
        self.names, self.labels = [item.name for item in items], labels
        self._files, self._bands = [item.file for item in items], bands

    def read(self, index: int) -> np.ndarray:
        return read_image(self._files[index], bands=self._bands)


def _stated(source: Path, part: str, items: list[Item], root: Path) -> list[int]:
    """Indices into ``items`` of the images a file or folder names for a split; those of another root are appended."""
    if source.suffix.lower() == ".txt":
        return _named(source, part, items, root)
    before, files = len(items), {item.file.resolve() for item in items}
    others = listed(source)
    if both := next((item for item in others if item.file.resolve() in files), None):
        raise RequestError(f"{part} {source}: {both.name} is an image of {root} too; an image is in one split only")
    items += others
    return list(range(before, len(items)))


def _named(source: Path, part: str, items: Sequence[Item], root: Path) -> list[int]:
    place = {item.name: index for index, item in enumerate(items)}
    try:
        names = [composed(line.strip()) for line in source.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{part} {source}: not a readable text in UTF-8 ({error})") from error
    if not names:
        raise RequestError(f"{part} {source}: names no image")
    if unknown := [name for name in names if name not in place]:
        raise RequestError(f"{part} {source}: {unknown[0]!r} is no image of {root} (such as {items[0].name!r})")
    return sorted({place[name] for name in names})


def _split(
    labels: list[int], classes: Sequence[str], pools: Mapping[str, list[int]], shares: Mapping[str, Any],
    per_class: int | None, seed: int,
) -> dict[str, list[int]]:  # fmt: skip
    """Indices of each split: as stated, the rest drawn."""
    taken = {index for pool in pools.values() for index in pool}
    free = [index for index in range(len(labels)) if index not in taken]
    left = {labels[index] for index in free}
    for part, pool in pools.items():
        if unseen := {labels[index] for index in pool} - left:
            raise RequestError(f"{part}: class {classes[min(unseen)]!r} has no image left to train on")
    drawn = draw([labels[i] for i in free], classes, per_class=per_class, seed=seed, **shares)
    members = {part: [free[i] for i in chosen] for part, chosen in drawn.items()}
    return members | {part: list(pool) for part, pool in pools.items()}
