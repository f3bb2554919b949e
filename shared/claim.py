"""Claims: a directory is written by one process at a time, however many are told to write it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from shared.errors import RequestError, WorkError

CLAIM = ".claim"  # the file that is locked; it lies in a directory as long as a process writes there
UNKNOWN = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextmanager
def claimed(folder: Path, *, fresh: bool) -> Iterator[None]:
    """Hold ``folder``, made where it is missing, until the block or the process ends, however that ends.

    fresh: the folder must be empty. It is looked at again here, as another process may have been there since.

    Raises RequestError where another process holds the folder, or it is not empty; WorkError where it cannot be
    written. Of an empty folder made here nothing is left. On a file system without locks only ``fresh`` guards.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        file = _held(folder)
    except OSError as error:
        _unmake(made)
        raise WorkError(f"{folder}: cannot be written: {error.strerror or error}") from error
    with file:
        try:
            if fresh and not is_empty(folder):
                raise RequestError(f"{folder}: another process has filled it meanwhile; choose another directory")
            yield
        finally:
            with suppress(OSError):
                (folder / CLAIM).unlink()
            _unmake(made)


def is_empty(folder: Path) -> bool:
    """Whether a directory holds nothing but, at most, the claim of a process that is there or was killed."""
    return all(path.name == CLAIM for path in folder.iterdir())


def _held(folder: Path) -> IO[bytes]:
    """The claim, open and locked."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = open(folder / CLAIM, "ab")  # noqa: SIM115
        except FileNotFoundError:  # removed between the two lines by its maker, which has failed
            continue
        try:
            _lock(file, folder)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / CLAIM)):
                return file
        except FileNotFoundError:  # removed by the process that held it before
            pass
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: IO[bytes], folder: Path) -> None:
    with suppress(ImportError):  # Windows has no such lock
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not passed on to workers that outlive a killed process
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                hint = "choose another directory, or wait until it has ended"
                raise RequestError(f"{folder}: another process is writing it; {hint}") from None
            if error.errno not in UNKNOWN:
                raise


def _unmake(made: list[Path]) -> None:
    """Remove the folders that were made and are empty, the innermost first."""
    for path in made:
        with suppress(OSError):
            path.rmdir()
