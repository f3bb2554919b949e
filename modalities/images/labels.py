"""Labels for image files: a table with the class and the probabilities of each."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from modalities.images.data import Preparation
from modalities.images.data.listing import images_below
from shared.errors import RequestError, WorkError
from shared.store import write_atomically

TABLE = "predictions.csv"
BATCH = 16


def label_files(
    predict: Callable[[Tensor], Tensor], classes: Sequence[str], preparation: Preparation, inputs: Sequence[Path],
    output: Path, *, overwrite: bool = False,
) -> None:  # fmt: skip
    """Classify every image of ``inputs`` (files, and folders with their subfolders) and write the table.

    predict: images (B, bands, size, size) to class probabilities (B, classes).
    output: a .csv file, or a folder in which ``predictions.csv`` is written. Its columns are file, label and
    ``p/<class>`` for each class.

    Raises RequestError before anything is read where the output is there already, unless ``overwrite``, or there is no
    image. A single image that cannot be read raises; of several, the others are written, and a WorkError names those.
    """
    table = table_at(output, overwrite)
    files, scores, failed = told_of_images(predict, preparation, inputs)
    rows = [_row(file, score, classes) for file, score in zip(files, scores, strict=True)]
    write_table(table, [["file", "label", *(f"p/{name}" for name in classes)], *rows])
    print(f"{table}: {len(rows)} images")
    if failed:
        raise WorkError(f"{len(failed)} of {len(files) + len(failed)} images failed: {', '.join(map(str, failed))}")


def table_at(output: Path, overwrite: bool) -> Path:
    """The .csv file to write. Raises RequestError where it is there already, or the output can be no table."""
    table = output if output.suffix.lower() == ".csv" else output / TABLE
    if output.is_file() and output != table:
        raise RequestError(f"{output}: a table is a .csv file, or goes into a folder")
    if table.exists() and not overwrite:
        raise RequestError(f"{table} exists already; --overwrite replaces it")
    return table


def write_table(table: Path, rows: Sequence[Sequence[str]]) -> None:
    """Write it whole or not at all; names that are no UTF-8 go in as they are."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_atomically(table, text.getvalue().encode(errors="surrogateescape"))


def told_of_images(
    tell: Callable[[Tensor], Tensor], preparation: Preparation, inputs: Sequence[Path]
) -> tuple[list[Path], Tensor, list[Path]]:
    """What ``tell`` says of images (B, bands, size, size), a row (N, ...) for each file; those that cannot be read.

    Raises RequestError where a single image cannot be read, WorkError where none can.
    """
    files = image_files(inputs, preparation.suffixes)
    failed: list[Path] = []
    done: list[Path] = []
    parts: list[Tensor] = []
    for batch in (files[start : start + BATCH] for start in range(0, len(files), BATCH)):
        read = list(_read(batch, preparation, failed, alone=len(files) == 1))
        if read:
            parts.append(tell(torch.stack([image for _, image in read])).cpu())
            done += [file for file, _ in read]
    if not done:
        raise WorkError(f"none of the {len(files)} images can be read")
    return done, torch.cat(parts), failed


def image_files(inputs: Sequence[Path], suffixes: Sequence[str]) -> list[Path]:
    """Files, and those of folders and their subfolders, each once. Raises RequestError for a folder without any."""
    files: list[Path] = []
    for path in inputs:
        found = images_below(path, suffixes) if path.is_dir() else [path]
        if not found:
            raise RequestError(f"{path}: holds no image ({', '.join(suffixes)})")
        files += found
    return list(dict.fromkeys(files))


def _read(
    files: Sequence[Path], preparation: Preparation, failed: list[Path], alone: bool
) -> Iterator[tuple[Path, Tensor]]:
    for file in files:
        try:
            yield file, preparation.normalised(preparation.square(preparation.read(file)))
        except RequestError as error:
            if alone:
                raise
            print(f"omniadapt: {error}", file=sys.stderr)
            failed.append(file)


def _row(file: Path, score: Tensor, classes: Sequence[str]) -> list[str]:
    return [file.as_posix(), classes[int(score.argmax())], *(f"{value:.6f}" for value in score.tolist())]
