"""Records on disk, found by key: a hit is what was written under that key, whole, or there is none.

Every process appends to a shard of its own, ``<name>.data``, and tells of a record in ``<name>.index`` once it is
written; each entry there has the checksum of key and record. So a kill at any moment, a file cut short or filled with
something else, and processes that write side by side lead to records that are missing, never to wrong ones.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import secrets
import struct
import time
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

_ENTRY = struct.Struct("<32s16sQQ")  # key, checksum, and where the record lies in the shard: offset and length
_log = logging.getLogger("omniadapt")


class Store:
    """The records in one folder. root: what is bounded, with all folders below it.  limit: bytes it may hold.

    written, broken: numbers of records that this process wrote, and that it found damaged.
    """

    def __init__(self, folder: Path, root: Path, limit: int):
        self.folder, self.root, self.limit = folder, root, limit
        self.written = self.broken = 0
        self._index: dict[bytes, tuple[_Shard, int, int, bytes | None]] = {}
        self._shards: dict[str, _Shard] = {}
        self._writer: _Writer | None = None
        self._told: set[str] = set()
        self.refresh()

    def __len__(self) -> int:
        return len(self._index)

    def refresh(self) -> None:
        """Take in what this and other processes have written since."""
        for path in sorted(self.folder.glob("*.index")):  # by age: of two records under a key the later counts
            shard = self._shards.setdefault(path.stem, _Shard(path))
            for key, check, offset, length in shard.news():
                self._index[key] = (shard, offset, length, check)

    def read(self, key: bytes) -> bytes | None:
        """The record under ``key``; None where there is none, or it is damaged. It is checked when first read."""
        if (found := self._index.get(key)) is None:
            return None
        shard, offset, length, check = found
        record = shard.read(offset, length)
        if record is None or (check is not None and checksum(key, record) != check):
            del self._index[key]
            self.broken += 1
            self._tell("damaged", f"{shard.path}: holds damaged records; they are computed again")
            return None
        if check is not None:
            self._index[key] = (shard, offset, length, None)
        return record

    def prefetch(self, keys: Iterable[bytes]) -> None:
        """Have the system read these records ahead."""
        for found in filter(None, map(self._index.get, keys)):
            found[0].expect(*found[1:3])

    def write(self, records: Mapping[bytes, bytes]) -> None:
        """Keep the records that are not here yet, as far as there is room."""
        room, new = None, {}
        for key, record in records.items():
            if key not in self._index and "stopped" not in self._told:
                room = self.limit - size(self.root) if room is None else room
                room -= len(record) + _ENTRY.size
                if room < 0:
                    full = f"it holds the {self.limit / 1e9:g} GB that trainer.cache.gigabytes allows"
                    self._tell("full", f"{self.root}: {full}; what is not in it is computed each time")
                    break
                new[key] = record
        if not new:
            return
        try:
            if self._writer is None or self._writer.process != os.getpid():
                self._writer = _Writer(self.folder)
            self._writer.append(new)
        except OSError as error:
            self._writer = None
            self._tell("stopped", f"{self.folder}: cannot be written ({error.strerror or error}); nothing more is kept")
            return
        self.written += len(new)
        self.refresh()

    def _tell(self, what: str, line: str) -> None:
        """Once."""
        if what not in self._told:
            self._told.add(what)
            _log.warning(line)


class _Writer:
    """A new shard, for this process alone."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(4)}"
        self.process, self.end = os.getpid(), 0
        new = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        self.data, self.index = (_opened(self, folder / f"{name}.{kind}", new) for kind in ("data", "index"))

    def append(self, records: Mapping[bytes, bytes]) -> None:
        entries = []
        for key, record in records.items():
            entries.append(_ENTRY.pack(key, checksum(key, record), self.end, len(record)))
            self.end += len(record)
        _write(self.data, b"".join(records.values()))
        _write(self.index, b"".join(entries))


class _Shard:
    """A shard as it is read: its index as it grows, its records through a memory map."""

    def __init__(self, path: Path):
        self.path = path.with_suffix(".data")
        self._index, self._seen = path, 0
        self._file: int | None = None
        self._map: mmap.mmap | None = None

    def news(self) -> list[tuple[bytes, bytes, int, int]]:
        """The whole entries that were added since the last call."""
        try:
            if self._index.stat().st_size < self._seen + _ENTRY.size:
                return []
            with open(self._index, "rb") as file:
                file.seek(self._seen)
                added = file.read()
        except OSError:
            return []
        whole = len(added) // _ENTRY.size * _ENTRY.size
        self._seen += whole
        return list(_ENTRY.iter_unpack(added[:whole]))

    def read(self, offset: int, length: int) -> bytes | None:
        """A copy; None where the file does not reach so far."""
        mapped = self._mapped(offset, length)
        if mapped is None:
            return None
        record = mapped[offset : offset + length]
        self._advise("MADV_DONTNEED", offset, length)  # it stays in the system's cache, not in this process's memory
        return record

    def expect(self, offset: int, length: int) -> None:
        if self._mapped(offset, length) is not None:
            self._advise("MADV_WILLNEED", offset, length)

    def _mapped(self, offset: int, length: int) -> mmap.mmap | None:
        try:
            if self._file is None:
                self._file = _opened(self, self.path, os.O_RDONLY)
            now = os.fstat(self._file).st_size  # reading a map beyond the end would kill the process
            if offset + length > now or not length:
                return None
            if self._map is None or offset + length > len(self._map):
                self._map = mmap.mmap(self._file, now, access=mmap.ACCESS_READ)
        except (OSError, ValueError):
            return None
        return self._map

    def _advise(self, what: str, offset: int, length: int) -> None:
        if self._map is not None and hasattr(mmap, what):
            start = offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(getattr(mmap, what), start, offset + length - start)


def checksum(key: bytes, record: bytes) -> bytes:
    return hashlib.sha256(key + record).digest()[:16]


def size(root: Path) -> int:
    """Bytes of the files in the folders below ``root``."""
    total = 0
    with suppress(FileNotFoundError):
        for folder in os.scandir(root):
            if folder.is_dir():
                with suppress(FileNotFoundError):
                    total += sum(file.stat().st_size for file in os.scandir(folder))
    return total


def _opened(owner: object, path: Path, flags: int) -> int:
    """A file that is closed with its owner."""
    file = os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)
    weakref.finalize(owner, os.close, file)
    return file


def _write(file: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]
