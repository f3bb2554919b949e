"""Partial results: strips of pixels on disk, appended one by one, from which a killed prediction goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from shared.errors import RequestError, WorkError
from shared.mapping.windows import Grid
from shared.store import write_atomically


class Strips:
    """A file of strips (rows, bands, columns), panel after panel and each from top to bottom.

    Only whole strips count: what a kill leaves of one is cut off. count: the strips that are there.
    """

    def __init__(self, file: IO[bytes], grid: Grid, bands: int, dtype: np.dtype):
        self.file, self.grid, self.bands, self.dtype = file, grid, bands, dtype
        size, self.count, end = os.fstat(file.fileno()).st_size, 0, 0
        for length in self._lengths():
            if end + length > size:
                break
            self.count, end = self.count + 1, end + length
        file.truncate(end)
        file.seek(end)

    def append(self, strip: np.ndarray) -> None:
        """Add a strip (bands, rows, columns); it is on the disk when this returns."""
        self.file.write(np.ascontiguousarray(strip.transpose(1, 0, 2), self.dtype).data)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.count += 1

    def read(self, number: int, top: int, bottom: int) -> np.ndarray:
        """Rows ``top`` to ``bottom`` (exclusive) of a panel: (bands, rows, columns)."""
        panel, height = self.grid.panels[number], self.grid.rows.length
        width = panel.right - panel.left
        pixel = self.bands * self.dtype.itemsize
        self.file.seek((height * panel.left + top * width) * pixel)
        stored = self.file.read((bottom - top) * width * pixel)
        return np.frombuffer(stored, self.dtype).reshape(bottom - top, self.bands, width).transpose(1, 0, 2)

    def _lengths(self) -> Iterator[int]:
        rows = self.grid.rows
        for panel in self.grid.panels:
            for band in range(len(rows.starts)):
                top, bottom = rows.completed(band)
                yield (bottom - top) * (panel.right - panel.left) * self.bands * self.dtype.itemsize


@contextmanager
def partial(
    target: Path, settings: Mapping[str, Any], grid: Grid, bands: int, dtype: Any
) -> Iterator[tuple[Path, Strips]]:
    """A hidden folder beside ``target`` with the strips of an unfinished result.

    Strips of a result with other ``settings`` are dropped. The folder goes when the work is done or has failed with a
    word of ours; it stays after a kill, an interruption or a fault of the program. Raises WorkError where the disk
    refuses (full, read-only), and RequestError where another process is at the same target.
    """
    folder = _folder(target)
    made = [path for path in target.parents if not os.path.exists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "strips", "a+b") as file:
            _lock(file, target)
            try:
                _keep(file, folder / "settings.json", json.dumps(settings, sort_keys=True).encode())
                yield folder, Strips(file, grid, bands, np.dtype(dtype))
            except (RequestError, WorkError, OSError):
                shutil.rmtree(folder)
                for path in made:
                    with suppress(OSError):  # another result is in it by now
                        path.rmdir()
                raise
            shutil.rmtree(folder)
    except OSError as error:
        raise WorkError(f"{target}: cannot be written: {error.strerror or error}") from error


def _keep(file: IO[bytes], note: Path, settings: bytes) -> None:
    """Keep the strips where they were made with equal settings, as a note beside them says; else begin anew."""
    if not note.is_file() or note.read_bytes() != settings:
        file.truncate(0)
        write_atomically(note, settings)


def clear(target: Path) -> None:
    """Remove the partial result of a finished target, which only a kill at the last moment leaves."""
    if (folder := _folder(target)).is_dir():
        with open(folder / "strips", "a+b") as file:
            _lock(file, target)
            shutil.rmtree(folder)


def _folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _lock(file: IO[bytes], target: Path) -> None:
    """Hold the file until it is closed or the process ends, however it ends."""
    with suppress(ImportError):  # Windows has no such lock
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"{target}: another process is writing it") from None
