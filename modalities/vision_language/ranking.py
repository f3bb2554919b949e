"""Ranked lists of files: images for each text, texts for each image, or the images most like each image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalities.images.data import Preparation
from modalities.images.labels import table_at, told_of_images, write_table
from shared.errors import RequestError, WorkError

QUERIES = ".txt"


def rank_files(
    task: Any, preparation: Preparation, inputs: Sequence[Path], output: Path, *, kind: str | None, top: int,
    overwrite: bool = False,
) -> None:  # fmt: skip
    """Rank and write one table, of the ``top`` most similar with their cosines.

    task: it gives ``embed_images`` and ``embed_texts``.  inputs: images and folders of them, and .txt files with a text
    a line.  kind: "images" (default) or "texts", what is ranked.
    With texts, "images" gives for each text the images (columns query, rank, file, similarity), and "texts" for each
    image the texts (file, rank, text, similarity); without any, "images" gives for each image the other images (query,
    rank, file, similarity).
    output: a .csv file, or a folder in which ``predictions.csv`` is written.

    Raises RequestError before anything is read where the output is there already, unless ``overwrite``, or what is
    asked does not fit the inputs. A single image that cannot be read raises; of several, the others are ranked, and a
    WorkError names those.
    """
    if kind not in (None, "images", "texts"):
        raise RequestError(f"predict --as {kind}: retrieval ranks images (default) or texts")
    if top < 1:
        raise RequestError(f"predict --top {top}: use at least 1")
    table = table_at(output, overwrite)
    queries = [path for path in inputs if path.suffix.lower() == QUERIES and not path.is_dir()]
    images = [path for path in inputs if path not in queries]
    if not images:
        raise RequestError(f"{queries[0]}: texts alone; name images, or a folder of them, too")
    texts = lines_of(queries)
    if kind == "texts" and not texts:
        raise RequestError("predict --as texts: name a .txt file with a text a line among the inputs")
    known = task.embed_texts(texts).cpu() if texts else None
    files, embedded, failed = told_of_images(task.embed_images, preparation, images)
    names = [file.as_posix() for file in files]
    if known is None:
        if len(files) < 2:
            raise RequestError(f"{names[0]}: one image and no text to compare it with; name a .txt file or more images")
        rows = _ranked(names, names, embedded, embedded, top, itself=False)
    elif kind == "texts":
        rows = _ranked(names, texts, embedded, known, top)
    else:
        rows = _ranked(texts, names, known, embedded, top)
    header = ("file", "rank", "text", "similarity") if kind == "texts" else ("query", "rank", "file", "similarity")
    write_table(table, [list(header), *rows])
    print(f"{table}: {len(files)} images" + (f", {len(texts)} texts" if texts else ""))
    if failed:
        raise WorkError(f"{len(failed)} of {len(files) + len(failed)} images failed: {', '.join(map(str, failed))}")


def lines_of(files: Sequence[Path]) -> list[str]:
    """The texts of files, a line each, without empty lines; one that comes twice counts once.

    Raises RequestError where a file is no readable text in UTF-8 or holds none.
    """
    found: dict[str, None] = {}
    for file in files:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{file}: not a readable text in UTF-8 ({error})") from error
        if not lines:
            raise RequestError(f"{file}: holds no text; write one a line")
        found |= dict.fromkeys(lines)
    return list(found)


def _ranked(
    queries: Sequence[str], others: Sequence[str], ours: Tensor, theirs: Tensor, top: int, *, itself: bool = True
) -> list[list[str]]:
    """Rows of query, rank, what is found, cosine. itself: whether the n-th of both, which are the same, may be."""
    rows: list[list[str]] = []
    for number, query in enumerate(queries):
        scores = theirs.double() @ ours[number].double()
        if not itself:
            scores[number] = -torch.inf
        count = min(top, len(others) - (not itself))
        best = torch.sort(scores, descending=True, stable=True).indices[:count].tolist()
        rows += [[query, str(rank), others[i], f"{scores[i]:.6f}"] for rank, i in enumerate(best, 1)]
    return rows
