"""What was generated, as a folder: pictures that say how they were made, a sheet of all, animations, and a page."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from shared.animation import encoded
from shared.errors import RequestError, WorkError
from shared.generating import Made
from shared.report import page, plots

PAGE, SETTINGS, SHEET = "page.html", "settings.json", "sheet.png"
SHOWN = 64  # pictures on the page; all are in the folder
PLAYED = 4  # videos on the page
MOVING = (".gif", ".webp", ".apng")  # endings of animations, the last where there is alpha
SHEET_SIDE = 4096  # greatest side of the sheet, pixels


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Raises RequestError where the folder is there already, and where it may be replaced but is none made here."""
    if not folder.exists() and not folder.is_symlink():
        return
    if not overwrite:
        raise RequestError(f"{folder}: it is there already; name another folder, or add --overwrite")
    if not (folder.is_dir() and (folder / SETTINGS).is_file() and (folder / PAGE).is_file()):
        raise RequestError(f"{folder}: --overwrite replaces what generate has written, and this is something else")


def write(folder: Path, made: Made, settings: Mapping[str, Any], *, random: bool = False) -> Path:
    """Fill the folder whole, or leave it as it was, and give its page. random: the model was never trained."""
    contents = _contents(made, settings, random)
    new = folder.with_name(f".{folder.name}.{os.getpid()}")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        for name, data in contents.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            with open(new / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    except OSError as error:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise WorkError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return folder / PAGE


def _contents(made: Made, settings: Mapping[str, Any], random: bool) -> dict[str, bytes]:
    """Every file of the folder by its name in there."""
    _check(made)
    text = json.dumps(dict(settings), indent=1, ensure_ascii=False, allow_nan=False)
    pictures = {name: _png(pixels, {**settings, "index": index}) for index, (name, pixels) in enumerate(_named(made))}
    contents = {**pictures, SETTINGS: text.encode(), SHEET: _png(_sheet(made), settings)}
    if made.kind != "images":
        for group, images in enumerate(made.images):
            stem = "animation" if len(made.images) == 1 else f"animation_{group:03}"
            kinds = MOVING if images.shape[-1] == 4 else MOVING[:2]
            contents |= {f"{stem}{kind}": _animated(images, made.rate, kind, settings) for kind in kinds}
    if taken := {*contents, PAGE} & made.files.keys():
        raise WorkError(f"the task made a file {sorted(taken)[0]!r}, a name that is taken")
    contents |= made.files
    contents[PAGE] = _page(made, settings, list(contents), random).encode()
    return contents


def _check(made: Made) -> None:
    if not made.images or not all(len(group) for group in made.images):
        raise WorkError("the task made no picture")
    for group in made.images:
        if group.dtype != np.uint8 or group.ndim != 4 or group.shape[-1] not in (3, 4):
            raise WorkError(f"the task made pictures of {group.dtype} {group.shape}; uint8 (N, H, W, 3 or 4) was asked")
        if made.names and len(made.names) != len(group):
            raise WorkError(f"the task named {len(made.names)} of {len(group)} pictures")
    for name in made.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise WorkError(f"the task made a file {name!r}, outside the folder")


def _named(made: Made) -> Iterator[tuple[str, np.ndarray]]:
    """File names and pixels (H, W, 3 or 4): numbered, in folders by group where groups have several."""
    if made.kind == "images":
        for index, pixels in enumerate(pixels for group in made.images for pixels in group):
            yield f"{index:04}.png", pixels
        return
    for group, images in enumerate(made.images):
        start = "" if len(made.images) == 1 else f"{group:03}/"
        for index, pixels in enumerate(images):
            name = f"_{made.names[index]}" if made.names else ""
            yield f"{start}{index:04}{name}.png", pixels


def _png(pixels: np.ndarray, facts: Mapping[str, Any]) -> bytes:
    """A PNG that says in text chunks how it was made."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    told = PngInfo()
    told.add_text("Software", "omniadapt")
    for name, value in facts.items():
        if value is not None:
            told.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "png", pnginfo=told)
    return buffer.getvalue()


def _sheet(made: Made) -> np.ndarray:
    """All pictures on one: a row for each group, or a square of single images; shrunk where that is too large."""
    from PIL import Image

    single = made.kind == "images"
    rows = [[p for group in made.images for p in group]] if single else [list(group) for group in made.images]
    if single:
        across = int(np.ceil(np.sqrt(len(rows[0]))))
        rows = [rows[0][start : start + across] for start in range(0, len(rows[0]), across)]
    height, width = (max(p.shape[axis] for row in rows for p in row) for axis in (0, 1))
    columns = max(map(len, rows))
    scale = min(1.0, SHEET_SIDE / (columns * width), SHEET_SIDE / (len(rows) * height))
    height, width = max(1, int(height * scale)), max(1, int(width * scale))
    sheet = Image.new("RGBA", (columns * width, len(rows) * height), "white")
    for row, pixels in enumerate(rows):
        for column, each in enumerate(pixels):
            picture = Image.fromarray(np.ascontiguousarray(each)).convert("RGBA")
            if scale < 1:
                picture = picture.resize((max(1, int(each.shape[1] * scale)), max(1, int(each.shape[0] * scale))))
            sheet.alpha_composite(picture, (column * width, row * height))
    return np.asarray(sheet.convert("RGB"))


def _animated(images: np.ndarray, rate: float, kind: str, settings: Mapping[str, Any]) -> bytes:
    """Frames as a file that repeats, what is transparent stays so; see ``shared.animation``."""
    return encoded(kind, images, [max(1, round(1000 / rate))] * len(images), settings)


def _page(made: Made, settings: Mapping[str, Any], files: list[str], random: bool) -> str:
    named = list(_named(made))
    shown = named[:SHOWN]
    told = f"{len(named)} pictures of {_counted(len(made.images), _WORDS[made.kind])}" if made.kind != "images" else ""
    left = f"The first {SHOWN} of {len(named)}; all are in the folder." if len(named) > SHOWN else ""
    rows = [(str(n), v if isinstance(v, str) else json.dumps(v)) for n, v in settings.items() if v not in (None, "")]
    moving = {name: name for name in files if name.endswith(MOVING)}
    further = {name: name for name in (SHEET, SETTINGS, *made.files)}
    return page.page(
        f"omniadapt: {settings.get('made by', 'generated')}",
        page.lead(str(settings.get("prompt") or told or f"{len(named)} pictures")),
        page.note("The model's weights are random, never trained: these pictures show that the parts work together.")
        if random
        else "",
        page.section("Pictures", *([page.lead(left)] if left else []), page.gallery(_rows(made, shown))),
        page.section("Moving", _moving(made) if made.kind == "frames" else "", page.links(moving)) if moving else "",
        page.section("Settings", page.table(("", ""), rows, numbers=2)),
        page.section("Files", page.links(further)),
    )


_WORDS = {"views": "object", "frames": "video"}


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _moving(made: Made) -> str:
    """The first videos as they play, in the page itself."""
    moving = (_address(_animated(images, made.rate, ".gif", {})) for images in made.images[:PLAYED])
    named = {f"video {number}": source for number, source in enumerate(moving)}
    return page.pictures(f"{made.rate:g} frames a second", named)


def _address(gif: bytes) -> str:
    return "data:image/gif;base64," + base64.b64encode(gif).decode()


def _rows(made: Made, named: list[tuple[str, np.ndarray]]) -> Iterator[str]:
    """Rows of at most six pictures, under the names of their files."""
    across = min(6, len(named)) if made.kind == "images" else min(6, len(made.images[0]))
    for start in range(0, len(named), across):
        part = named[start : start + across]
        label = part[0][0] if len(part) == 1 else f"{part[0][0]} to {part[-1][0]}"
        yield page.pictures(label, {_short(name): plots.png(pixels) for name, pixels in part})


def _short(name: str) -> str:
    """ "front right" of 0001_front_right.png, else its number."""
    number, _, word = PurePosixPath(name).stem.partition("_")
    return word.replace("_", " ") or number
