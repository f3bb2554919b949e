"""Labelled texts in files: CSV, TSV and JSON lines with named columns, or lines of a label and a text."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from shared.errors import RequestError

TABLES = {".csv": ",", ".tsv": "\t"}
LINES = (".jsonl", ".ndjson")
LONGEST = 1_000_000  # characters of one text


class Row(NamedTuple):
    """label: as the file spells it, "" where there is none to read.  name: file and line."""

    text: str
    label: str
    name: str


def read(path: Path, *, text: str = "text", label: str | None = "label", encoding: str = "utf-8") -> list[Row]:
    """The rows of a file, by its suffix: .csv and .tsv with a header, .jsonl of objects, else a text in every line,
    after its label and a space where ``label`` is not None. Empty lines of such a file are passed over.

    text, label: names of columns or keys; label None where there is none to read.

    Raises RequestError with file and line: missing, empty, bytes that are no text in ``encoding``, a column that is not
    there, a text that is empty or longer than ``LONGEST``, a label that is missing or not a number (NaN).
    """
    if not path.is_file():
        raise RequestError(f"{path}: no such file")
    content = decode(path, encoding)
    suffix = path.suffix.lower()
    if suffix in TABLES:
        found = _table(path, content, TABLES[suffix], text, label)
    elif suffix in LINES:
        found = _objects(path, content, text, label)
    else:
        found = _lines(path, content, label is not None)
    rows = [_checked(row, label is not None) for row in found]
    if not rows:
        raise RequestError(f"{path}: it holds no text")
    return rows


def decode(path: Path, encoding: str) -> str:
    """The content of a text file. Raises RequestError with the line of the first byte that is none in ``encoding``."""
    try:
        raw = path.read_bytes()
        return raw.decode("utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{raw[error.start]:02x}" if error.start < len(raw) else "its end"
        raise RequestError(
            f"{path}: line {line}: {byte} is no {encoding} text; give encoding=latin-1, or the file's own"
        ) from error
    except LookupError as error:
        raise RequestError(f"encoding {encoding!r}: no encoding that Python knows") from error
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from error


def _table(path: Path, content: str, delimiter: str, text: str, label: str | None) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    try:
        for column in (text, *([label] if label else [])):
            if column not in (reader.fieldnames or ()):
                raise RequestError(
                    f"{path}: no column {column!r}; it has {', '.join(reader.fieldnames or ()) or 'none'}"
                )
        for row in reader:
            name = f"{path.name}:{reader.line_num}"
            if None in row or None in row.values():
                raise RequestError(
                    f"{path}: line {reader.line_num}: not the {len(reader.fieldnames or ())} fields of the header"
                )
            yield Row(row[text], row[label] if label else "", name)
    except csv.Error as error:
        raise RequestError(f"{path}: line {reader.line_num}: {error}") from error


def _objects(path: Path, content: str, text: str, label: str | None) -> Iterator[Row]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            item: Any = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise RequestError(f"{path}: line {number}: no JSON ({getattr(error, 'msg', error)})") from error
        if not isinstance(item, dict) or not isinstance(item.get(text), str):
            raise RequestError(f"{path}: line {number}: wants an object with a text under {text!r}")
        value = item.get(label) if label else ""
        if isinstance(value, (dict, list, bool)) or (isinstance(value, float) and not math.isfinite(value)):
            raise RequestError(f"{path}: line {number}: {value!r} is no label")
        yield Row(item[text], "" if value is None else str(value), f"{path.name}:{number}")


def _lines(path: Path, content: str, labelled: bool) -> Iterator[Row]:
    for number, line in enumerate(content.split("\n"), 1):
        line = line.strip()
        if not line:
            continue
        label, _, text = line.partition(" ") if labelled else ("", "", line)
        yield Row(text, label, f"{path.name}:{number}")


def _checked(row: Row, labelled: bool) -> Row:
    """The row without outer blanks. Raises RequestError where its text or label is none."""
    text, label = row.text.strip(), row.label.strip()
    if not text:
        raise RequestError(f"{row.name}: the text is empty")
    if len(text) > LONGEST:
        raise RequestError(
            f"{row.name}: a text of {len(text):,} characters; one line is one text of at most {LONGEST:,}"
        )
    if "\0" in text:
        raise RequestError(f"{row.name}: a zero byte; this is no text file")
    if labelled and (not label or label.lower() in ("nan", "null", "none")):
        raise RequestError(f"{row.name}: the label is {label or 'missing'!r}")
    return Row(text, label, row.name)
