"""Animated images written: GIF, WebP and APNG, with transparency, times and facts about them in the file."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import RequestError
from shared.store import write_atomically

FORMATS = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG", ".apng": "PNG"}
_DESCRIPTION = 0x010E  # the EXIF tag ImageDescription


def write_animation(
    path: Path, frames: np.ndarray, durations: float | Sequence[float], facts: Mapping[str, Any] | None = None
) -> None:
    """Write a clip that repeats for ever; the file is whole or not there.

    path: its ending says the format: .gif, .webp (lossless), .png or .apng.
    frames: uint8 (F, H, W, 3) or (F, H, W, 4), the last channel alpha.
    durations: of each frame, or of all, milliseconds; a GIF counts in steps of 10, of which viewers want 2 at least.
    facts: kept in the file as JSON: a GIF's comment, a WebP's EXIF description, a PNG's text "description".

    A GIF has 255 colours a frame and no half-transparent pixel (those below 128 become transparent); the other two
    give back what was written. A frame that repeats the one before it may be stored as a longer one.

    Raises RequestError for another ending or shape, and WorkError where the disk refuses.
    """
    if path.suffix.lower() not in FORMATS:
        raise RequestError(f"{path}: animations are written as {', '.join(FORMATS)}")
    if frames.ndim != 4 or frames.shape[-1] not in (3, 4) or frames.dtype != np.uint8 or not len(frames):
        raise RequestError(f"{path}: frames of shape {frames.shape} and {frames.dtype}: use uint8 (F, H, W, 3 or 4)")
    times = [float(durations)] * len(frames) if isinstance(durations, (int, float)) else [float(d) for d in durations]
    if len(times) != len(frames) or min(times) <= 0:
        raise RequestError(f"{path}: {len(frames)} frames want as many durations above 0, or one for all")
    write_atomically(path, encoded(path.suffix.lower(), frames, times, facts))


def read_facts(path: Path) -> dict[str, Any]:
    """What ``write_animation`` was told of a file; {} where it holds nothing of the kind."""
    from PIL import Image

    with Image.open(path) as file:
        comment = file.info.get("comment", b"{}")
        found = {"GIF": comment, "WEBP": file.getexif().get(_DESCRIPTION), "PNG": file.info.get("description")}
        text = found.get(file.format or "")
    try:
        facts = json.loads(text or "{}")
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def encoded(ending: str, frames: np.ndarray, times: Sequence[float], facts: Mapping[str, Any] | None = None) -> bytes:
    """The bytes of such a file. ending: one of ``FORMATS``.  times: of each frame, milliseconds."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    form, description = FORMATS[ending], json.dumps(dict(facts or {}))
    more: dict[str, Any]
    if form == "GIF":
        pictures = [_palette(frame) for frame in frames]
        times = [max(20, 10 * round(time / 10)) for time in times]
        more = {"disposal": 2, "optimize": False, "comment": description.encode()}
        more |= {"transparency": 255} if frames.shape[-1] == 4 else {}
    else:
        pictures = [Image.fromarray(frame) for frame in frames]
        times = [round(time) for time in times]
        if form == "WEBP":
            exif = Image.Exif()
            exif[_DESCRIPTION] = description
            more = {"lossless": True, "exact": True, "exif": exif}
        else:
            text = PngInfo()
            text.add_text("description", description)
            more = {"pnginfo": text}
    buffer = io.BytesIO()
    pictures[0].save(buffer, form, save_all=True, append_images=pictures[1:], duration=times, loop=0, **more)
    return buffer.getvalue()


def _palette(frame: np.ndarray) -> Any:
    """A picture of at most 255 colours, and 255 for what is transparent."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(frame[..., :3])).quantize(255, dither=Image.Dither.NONE)
    if frame.shape[-1] == 3:
        return picture
    places = np.array(picture)
    places[frame[..., 3] < 128] = 255
    found = Image.frombytes("P", picture.size, places.tobytes())
    palette = picture.getpalette() or []
    found.putpalette(palette + [0] * (768 - len(palette)))
    return found
