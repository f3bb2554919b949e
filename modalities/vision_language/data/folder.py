"""Images of a folder with captions in a table."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from modalities.images.data import read_image
from modalities.vision_language.data.captioned import ImagesWithCaptions, drawn
from shared.errors import RequestError

TABLE = "captions.csv"


class CaptionedFolder(ImagesWithCaptions):
    """PNG, JPEG, TIFF and WebP files, and a table ``captions.csv`` beside them with a row for each caption."""

    def __init__(
        self,
        *,
        root: Path,
        validation: float | Path = 0.1,
        test: float | Path = 0.1,
        bands: int = 3,
        size: int = 224,
        crop: float = 0.9,
        flip: Literal["horizontal", "both"] | None = None,
        normalisation: str | Mapping[str, Sequence[float]] = "backbone",
        batch_size: int = 128,
        workers: int = 0,
        seed: int | None = None,
    ):
        """
        Args:
            root: a folder with ``captions.csv``, or such a table. Its columns are file (path from the table's folder)
                and caption; an image of several captions has as many rows.
            validation: a fraction of the images, at least one; or another such folder or table.
            test: likewise.
            bands: 3 for RGB, 1 for grey; a file with other channels is an error.
            size: pixels a side of what the model sees.
            crop: least share of the area that a training crop takes (open_clip: 0.9), 1 for the middle square.
            flip: in training; captions that say left and right want none (open_clip has none).
            normalisation: "backbone" (the statistics its weights were trained with), "measured" (on the images that
                train), or {mean: [...], std: [...]} of each band in values from 0 to 255.
            batch_size: images.  workers: processes that read.
            seed: of the draws, the order and the augmentation; None: the run's.

        Raises RequestError, in one line that names the file, where something is wrong with the table or the images.
        """
        seed = seed or 0
        source = _Files(Path(root), bands)
        stated = {part: source.add(Path(wanted), part) for part, wanted in (("validation", validation), ("test", test))
                  if not isinstance(wanted, (int, float))}  # fmt: skip
        shares = {part: float(wanted) for part, wanted in (("test", test), ("validation", validation))
                  if isinstance(wanted, (int, float))}  # fmt: skip
        members = drawn(source.own, shares, seed) | stated
        super().__init__(
            source, members, bands=bands, size=size, crop=crop, flip=flip, normalisation=normalisation,
            batch_size=batch_size, workers=workers, seed=seed,
        )  # fmt: skip


class _Files:
    """The files as a ``CaptionSource``: those of the root, ``own`` in number, then those of the tables added."""

    def __init__(self, root: Path, bands: int):
        self.names: list[str] = []
        self.captions: list[tuple[str, ...]] = []
        self._files: list[Path] = []
        self._bands, self._root = bands, root
        self.own = len(self.add(root, "root"))

    def add(self, root: Path, what: str) -> list[int]:
        """The indices of a table's images."""
        rows, known, first = captions_of(root), {file.resolve() for file in self._files}, len(self.names)
        for file, (name, captions) in rows.items():
            if file.resolve() in known:
                raise RequestError(f"{what} {root}: {name} is an image of another split too; an image is in one only")
            self.names.append(name)
            self.captions.append(captions)
            self._files.append(file)
        return list(range(first, len(self.names)))

    def read(self, index: int) -> np.ndarray:
        return read_image(self._files[index], bands=self._bands)


def captions_of(root: Path) -> dict[Path, tuple[str, tuple[str, ...]]]:
    """The images of a table, or of the ``captions.csv`` of a folder: name and captions by file, sorted by name.

    Raises RequestError that names the line where a file or a caption is missing or a row comes twice.
    """
    table = root / TABLE if root.is_dir() else root
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"{table}: not a readable table in UTF-8 ({error})") from error
    if not {"file", "caption"} <= set(columns):
        raise RequestError(f"{table}: wants a first line with file and caption, got {', '.join(columns) or 'nothing'}")
    found: dict[str, list[str]] = {}
    for number, row in enumerate(rows, 2):
        name, caption = (row["file"] or "").strip(), " ".join((row["caption"] or "").split())
        if not name or not caption:
            raise RequestError(f"{table}: line {number} lacks a file or a caption")
        if name not in found and not (table.parent / name).is_file():
            raise RequestError(f"{table}: line {number}: no such file: {table.parent / name}")
        if caption in found.setdefault(name, []):
            raise RequestError(f"{table}: line {number} gives {name} the same caption a second time")
        found[name].append(caption)
    if not found:
        raise RequestError(f"{table}: holds no row")
    return {table.parent / name: (name, tuple(found[name])) for name in sorted(found)}
