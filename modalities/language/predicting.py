"""Files of texts in, CSV of labels and probabilities out."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalities.language.data import reading
from modalities.language.data.texts import padded
from modalities.language.tokens import Tokens
from shared.errors import RequestError, WorkError
from shared.store import write_atomically

READABLE = (".txt", *reading.TABLES, *reading.LINES)
BATCH = 32


def classify_files(
    scores: Callable[[dict[str, Tensor]], Tensor], classes: Sequence[str], how: Mapping[str, Any],
    inputs: Sequence[Path], output: Path, *, kind: str | None = None, overwrite: bool = False, **others: Any,
) -> None:  # fmt: skip
    """Write for every file of ``inputs`` (files, and folders searched with their subfolders) a CSV with a row for each
    text: ``text``, ``label`` and the probability of each class.

    A file is .csv or .tsv with a column ``text``, .jsonl with that key, or a text in every line.

    scores: a batch's ``tokens`` and ``mask`` to probabilities (B, classes).  how: ``tokenizer`` and ``max_length``.
    output: a .csv file, for one input; else a folder, which is made where it is missing.

    Raises RequestError before anything is written where inputs and outputs do not fit together. A single file raises
    what reading it does; of several, the others are done, and a WorkError in the end names those that failed.
    """
    if kind not in (None, "classes", "probabilities"):
        raise RequestError(f"output {kind!r}: texts give classes and probabilities, both in one table")
    if given := [name for name, value in others.items() if value is not None]:
        raise RequestError(f"--{given[0]} is for rasters; this run classifies texts")
    pairs, tokens, failed = targets(inputs, output, overwrite), Tokens(how["tokenizer"]), []
    for source, target in pairs:
        try:
            texts = [row.text for row in reading.read(source, label=None)]
            found = _probabilities(scores, tokens, how["max_length"], texts, source)
            write_atomically(target, _table(texts, classes, found).encode())
        except (RequestError, WorkError) as error:
            if len(pairs) == 1:
                raise
            print(f"omniadapt: {error}", file=sys.stderr)
            failed.append(str(source))
        else:
            counts = found.argmax(1).bincount(minlength=len(classes)).tolist()
            said = ", ".join(f"{name} {count}" for name, count in zip(classes, counts, strict=True) if count)
            print(f"{target}: {len(texts)} texts: {said}")
    if failed:
        raise WorkError(f"{len(failed)} of {len(pairs)} files failed: {', '.join(failed)}")


def targets(inputs: Sequence[Path], output: Path, overwrite: bool) -> list[tuple[Path, Path]]:
    """Each file to read with the file to write. Raises RequestError where two share one or something is in the way."""
    if len(inputs) == 1 and not inputs[0].is_dir() and output.suffix and not output.is_dir():
        pairs = [(inputs[0], output)]
    elif output.suffix.lower() == ".csv" or output.is_file():
        raise RequestError(f"{output}: several files are written to a folder; name one")
    else:
        pairs = [(source, output / inside.with_suffix(".csv")) for path in inputs for source, inside in _files(path)]
    sources: dict[Path, Path] = {}
    for source, target in pairs:
        if sources.setdefault(target, source) != source:
            raise RequestError(f"{sources[target]} and {source} would both become {target}; do them one by one")
        if target.exists() and any(target.samefile(other) for other, _ in pairs if other.exists()):
            raise RequestError(f"{target}: a result would overwrite an input; choose another name")
        if target.exists() and not overwrite:
            raise RequestError(f"{target} exists; add --overwrite to replace it")
    return pairs


def _files(path: Path) -> list[tuple[Path, Path]]:
    """A file, or the readable ones of a folder, with their place in the output."""
    if not path.is_dir():
        return [(path, Path(path.name))]
    found = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in READABLE and file.is_file()]
    if not found:
        raise RequestError(f"{path}: holds no file of texts ({', '.join(READABLE)})")
    return [(file, file.relative_to(path)) for file in found]


def _probabilities(
    scores: Callable[[dict[str, Tensor]], Tensor], tokens: Tokens, longest: int, texts: Sequence[str], source: Path
) -> Tensor:
    parts = [
        scores(padded(tokens.encode(texts[i : i + BATCH], longest), tokens.padding))
        for i in range(0, len(texts), BATCH)
    ]  # fmt: skip
    found = torch.cat(parts)
    if not torch.isfinite(found).all():
        raise WorkError(f"{source}: the class scores are not finite: the weights hold NaN")
    return found


def _table(texts: Sequence[str], classes: Sequence[str], probabilities: Tensor) -> str:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["text", "label", *classes])
    for text, row in zip(texts, probabilities.tolist(), strict=True):
        writer.writerow([text, classes[row.index(max(row))], *(f"{value:.6f}" for value in row)])
    return file.getvalue()
