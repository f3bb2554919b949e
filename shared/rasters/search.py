"""Search: the rasters of a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

from shared.errors import RequestError
from shared.rasters.reading import SUFFIXES


def rasters_below(folder: Path) -> list[Path]:
    """Everything in a folder and its subfolders that is named like a raster, in the order of names.

    Hidden files and folders are left out. Links to folders are not followed: they may lead back, or bring one raster
    under two names. A link that leads to no file is listed, so that reading it tells. Raises RequestError where there
    is nothing, or a folder cannot be read.
    """
    found: list[Path] = []
    try:
        for path, folders, files in os.walk(folder, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            shown = [Path(path, name) for name in files if not name.startswith(".")]
            found += [file for file in shown if file.suffix.lower() in SUFFIXES]
    except OSError as error:
        raise RequestError(f"{error.filename}: cannot be read: {error.strerror}") from error
    if not found:
        raise RequestError(f"{folder}: holds no raster ({', '.join(SUFFIXES)}; links to folders are not followed)")
    return sorted(found)


def _raise(error: OSError) -> NoReturn:
    raise error
