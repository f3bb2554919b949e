"""Files of prompts: what is asked about an image, in points, boxes and rough masks, read from JSON or CSV, checked."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modalities.images.data import read_image
from shared.errors import RequestError

BESIDE = (".prompts.json", ".prompts.csv")  # after the name of an image without its suffix
KEYS = {"name", "points", "labels", "box", "mask"}
CORNERS = ("left", "top", "right", "bottom")


class Asked(NamedTuple):
    """One object, in pixels of the image, x to the right before y downwards; 0, 0 is the middle of the first pixel.

    points: (N, 2).  labels: (N,), 1 on the object, 0 off it.  box: left, top, right, bottom.  mask: bool (H, W).
    """

    name: str
    points: np.ndarray
    labels: np.ndarray
    box: tuple[float, float, float, float] | None = None
    mask: np.ndarray | None = None

    @property
    def places(self) -> np.ndarray:
        """All x, y (N, 2) that the prompts name."""
        parts = [self.points]
        if self.box is not None:
            parts.append(np.array(self.box).reshape(2, 2))
        if self.mask is not None:
            rows, columns = np.nonzero(self.mask)
            parts.append(np.array([[columns.min(), rows.min()], [columns.max(), rows.max()]]))
        return np.concatenate(parts)


def prompt_file(image: Path, given: Path | None, inside: Path) -> Path | None:
    """The file of an image's prompts: ``given``, the one of the image's name in the folder ``given``, or where none is
    given ``<name>.prompts.json`` or ``.prompts.csv`` beside the image; None where there is none beside it.

    inside: the image's path below its input.  Raises RequestError where there is none where it was to be.
    """
    if given is not None and not given.is_dir():
        return given
    folder = image.parent if given is None else given / inside.parent
    ends = BESIDE if given is None else (".json", ".csv")
    found = [path for end in ends if (path := folder / f"{image.stem}{end}").exists()]
    if len(found) > 1:
        raise RequestError(f"{found[0]} and {found[1].name} both hold prompts of {image.name}; keep one of them")
    if not found and given is not None:
        raise RequestError(f"{image}: no prompts: {given / inside.parent / image.stem}.json or .csv is missing")
    return found[0] if found else None


def read_prompts(path: Path, size: tuple[int, int]) -> list[Asked]:
    """The objects that a file asks about, of an image of ``size`` (height, width).

    JSON: a list of objects (or {"objects": list}), each with some of ``points`` [[x, y], ...] with ``labels`` [1, 0,
    ...] (1 on it, the default, or 0 off it), ``box`` [left, top, right, bottom], ``mask`` (a grey image of the size of
    the whole, from the file's folder) and ``name``.
    CSV: a row for each point (columns x, y, and label) or box (left, top, right, bottom); rows of one ``object`` belong
    together, a row without one is an object of its own.

    Raises RequestError that names the file and the object: what cannot be read, and prompts outside the image.
    """
    if not path.is_file():
        raise RequestError(f"{path}: no such file of prompts")
    if path.suffix.lower() not in (".json", ".csv"):
        raise RequestError(f"{path}: prompts are read from a .json or .csv file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        entries = _rows(path, text) if path.suffix.lower() == ".csv" else _entries(path, json.loads(text))
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise RequestError(f"{path}: not a readable {path.suffix[1:].upper()} file in UTF-8 ({error})") from error
    if not entries:
        raise RequestError(f"{path}: asks about no object")
    return [_object(path, number, entry, size) for number, entry in enumerate(entries, 1)]


def _entries(path: Path, read: Any) -> list[Any]:
    listed = read.get("objects") if isinstance(read, dict) else read
    if not isinstance(listed, list):
        raise RequestError(f'{path}: wants a list of objects, or {{"objects": [...]}}')
    return listed


def _rows(path: Path, text: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(text.splitlines())
    columns, known = set(reader.fieldnames or ()), {"object", "x", "y", "label", *CORNERS}
    if not ({"x", "y"} <= columns or set(CORNERS) <= columns) or not columns <= known:
        have = ", ".join(reader.fieldnames or ()) or "nothing"
        raise RequestError(
            f"{path}: wants the columns x, y (and label) or {', '.join(CORNERS)}, and object; got {have}"
        )
    objects: dict[str, dict[str, Any]] = {}
    for line, row in enumerate(reader, 2):
        if None in row or None in row.values():
            raise RequestError(f"{path}: line {line} has not as many values as there are columns")
        entry = objects.setdefault(row.get("object") or f"line {line}", {})
        if row.get("object"):
            entry["name"] = row["object"]
        corners, place = [row.get(side, "") for side in CORNERS], [row.get("x", ""), row.get("y", "")]
        if any(corners):
            if "box" in entry:
                raise RequestError(f"{path}: line {line}: a second box of object {row.get('object')}")
            entry["box"] = [_number(path, line, value) for value in corners]
        if any(place):
            entry.setdefault("points", []).append([_number(path, line, value) for value in place])
            entry.setdefault("labels", []).append(_number(path, line, row.get("label") or "1"))
        if not (any(corners) or any(place)):
            raise RequestError(f"{path}: line {line} holds neither a point nor a box")
    return list(objects.values())


def _number(path: Path, line: int, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"{path}: line {line}: {text!r} is no number") from None


def _object(path: Path, number: int, entry: Any, size: tuple[int, int]) -> Asked:
    where = f"{path}: object {number}"
    if not isinstance(entry, Mapping) or not KEYS.issuperset(entry):
        raise RequestError(f"{where}: wants points and labels, box, mask, and name; got {str(entry)[:80]}")
    points = _numbers(where, "points", entry.get("points", []), 2)
    labels = entry.get("labels", [1] * len(points))
    if not isinstance(labels, Sequence) or len(labels) != len(points) or any(each not in (0, 1) for each in labels):
        raise RequestError(f"{where}: labels {labels}: one for each of its {len(points)} points, 1 on it or 0 off it")
    box = _numbers(where, "box", [entry["box"]], 4)[0] if entry.get("box") is not None else None
    mask = _mask(where, path.parent / str(entry["mask"]), size) if entry.get("mask") is not None else None
    if not len(points) and box is None and mask is None:
        raise RequestError(f"{where}: neither points nor a box nor a mask")
    if box is not None and (box[2] <= box[0] or box[3] <= box[1]):
        raise RequestError(f"{where}: box {box.tolist()} is empty; give left, top, right, bottom")
    corners = None if box is None else (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
    name = str(entry.get("name") or number)
    asked = Asked(name, points, np.array(labels, np.int64).reshape(-1), corners, mask)
    for what, places in (("point", points), ("box corner", np.array(corners or ()).reshape(-1, 2))):
        for x, y in places:
            if not (0 <= x <= size[1] and 0 <= y <= size[0]):
                image = f"{size[1]} pixels wide and {size[0]} high"
                raise RequestError(f"{where}: {what} ({x:g}, {y:g}) lies outside the image, {image}")
    return asked


def _numbers(where: str, what: str, given: Any, count: int) -> np.ndarray:
    """(N, count) of lists of as many finite numbers."""
    try:
        found = np.array(given, float).reshape(-1, count) if given else np.zeros((0, count))
    except (TypeError, ValueError):
        found = np.full((1, count), math.nan)
    if not isinstance(given, list) or len(found) != len(given) or not np.isfinite(found).all():
        raise RequestError(f"{where}: {what} {str(given)[:80]}: wants {count} numbers each")
    return found


def _mask(where: str, file: Path, size: tuple[int, int]) -> np.ndarray:
    try:
        grey = read_image(file, bands=1)[0]
    except RequestError as error:
        raise RequestError(f"{where}: mask {error}") from error
    if grey.shape != size:
        sizes = f"{grey.shape[0]} x {grey.shape[1]} pixels, its image {size[0]} x {size[1]}"
        raise RequestError(f"{where}: mask {file}: {sizes}; a mask has its image's size")
    if not (grey > 127).any():
        raise RequestError(f"{where}: mask {file} is empty: no pixel is above 127")
    return grey > 127
