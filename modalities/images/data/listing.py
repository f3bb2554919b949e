"""Which images there are and of which class: a folder for each class, or a table of path and label."""

from __future__ import annotations

import csv
import difflib
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from modalities.images.data.files import SUFFIXES
from shared.errors import RequestError


class Item(NamedTuple):
    """An image. name: its path below the root, with slashes.  label: as the folder or the table spells it."""

    name: str
    file: Path
    label: str


def listed(root: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Item]:
    """The images of ``root``, by name: ``<class>/**/<image>`` of a folder, the rows of a .csv file.

    Hidden files and folders, and files that are no images by their suffix, are passed over. Names are compared in
    Unicode's composed form (NFC), whatever the file system makes of them.

    Raises RequestError where there is nothing, an image is missing, or a name is not valid UTF-8.
    """
    items = _rows(root) if root.suffix.lower() == ".csv" else _files(root, suffixes)
    for item in items:
        if not _utf8(item.name):
            raise RequestError(f"{root}: the file name {item.name!a} is not valid UTF-8; rename it")
    return sorted(items)


def images_below(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The image files of a folder and its subfolders but for hidden ones, by name."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in suffixes and path.is_file()]
    return [p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)]


def composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _files(root: Path, suffixes: Sequence[str]) -> list[Item]:
    if not root.is_dir():
        raise RequestError(f"{root}: wants a folder with one folder for each class, or a .csv file")
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    if not folders:
        raise RequestError(f"{root}: holds no folder; there is to be one for each class, with images in it")
    items = []
    for folder in folders:
        files = images_below(folder, suffixes)
        if not files:
            raise RequestError(f"{folder}: holds no image ({', '.join(suffixes)})")
        label = composed(folder.name)
        items += [Item(composed(file.relative_to(root).as_posix()), file, label) for file in files]
    return items


def _rows(table: Path) -> list[Item]:
    """The images of a table with the columns path (from the table's folder) and label."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"{table}: not a readable table in UTF-8 ({error})") from error
    if not {"path", "label"} <= set(columns):
        raise RequestError(f"{table}: wants a first line with path and label, got {', '.join(columns) or 'nothing'}")
    items, seen = [], set()
    for number, row in enumerate(rows, 2):
        path, label = row["path"], row["label"]
        if not path or not label:
            raise RequestError(f"{table}: line {number} lacks a path or a label")
        file = table.parent / path
        if not file.is_file():
            raise RequestError(f"{table}: line {number}: no such file: {file}")
        if (true := file.resolve()) in seen:
            raise RequestError(f"{table}: line {number} names {path} a second time")
        seen.add(true)
        items.append(Item(composed(path), file, composed(label.strip())))
    if not items:
        raise RequestError(f"{table}: holds no row")
    return items


def _utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that Python carries as lone surrogates
        return False
    return True


def class_names(items: Sequence[Item], root: Path, classes: Sequence[str] | None) -> tuple[str, ...]:
    """The classes in the order of their index: as given, else those found, by name (by value where all are numbers).

    Raises RequestError where there is one class only, or one without an image.
    """
    found = {item.label for item in items}
    if classes is None:
        numbers = all(label.isdecimal() for label in found)
        names = tuple(sorted(found, key=int) if numbers else sorted(found))
    else:
        names = tuple(composed(name) for name in classes)
    if len(names) < 2 or len(set(names)) < len(names):
        raise RequestError(f"{root}: classes {', '.join(names)}: two or more different ones are needed")
    absent = set(range(len(names))) - {index_of(item, names) for item in items}
    if absent:
        raise RequestError(f"{root}: no image of class {names[min(absent)]!r}")
    return names


def index_of(item: Item, classes: Sequence[str]) -> int:
    """The index of an item's class: its label is the name, or the index itself where no class has that name."""
    if item.label in classes:
        return classes.index(item.label)
    if item.label.lstrip("-").isdecimal():
        if 0 <= (index := int(item.label)) < len(classes):
            return index
        raise RequestError(f"{item.file}: label {index} is out of range; the classes are 0 to {len(classes) - 1}")
    near = difflib.get_close_matches(item.label, classes, n=1)
    hint = f"nearest: {near[0]!r}" if near else f"there are {', '.join(classes)}"
    raise RequestError(f"{item.file}: class {item.label!r} is none of those that train; {hint}")
