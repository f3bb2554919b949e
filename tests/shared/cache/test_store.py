"""Records on disk: whatever happens to the files, and whoever writes, a hit is what was written under that key."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path

import pytest

from shared.cache.store import _ENTRY, Store, checksum, size

SIZE = 200


def key(number: int) -> bytes:
    return hashlib.sha256(f"key {number}".encode()).digest()


def record(number: int) -> bytes:
    """What belongs under ``key(number)``, and nowhere else."""
    return (hashlib.sha256(f"record {number}".encode()).digest() * 7)[:SIZE]


def opened(folder: Path, limit: int = 10**9) -> Store:
    return Store(folder / "one", folder, limit)


def filled(folder: Path, *numbers: int) -> Store:
    store = opened(folder)
    store.write({key(n): record(n) for n in numbers})
    return store


def found(store: Store, count: int = 20) -> set[int]:
    """The numbers that are found, each with its record."""
    hits = {n: store.read(key(n)) for n in range(count)}
    assert all(hit in (None, record(n)) for n, hit in hits.items()), "a wrong record"
    return {n for n, hit in hits.items() if hit is not None}


def files(folder: Path, kind: str) -> list[Path]:
    return sorted((folder / "one").glob(f"*.{kind}"))


def test_a_record_is_found_under_its_key_alone_by_whoever_opens_the_folder(tmp_path: Path) -> None:
    store = opened(tmp_path)
    assert found(store) == set()
    assert not (tmp_path / "one").exists()
    store.write({key(0): record(0)})
    store.write({key(3): record(3), key(0): record(0)})
    assert found(store) == found(opened(tmp_path)) == {0, 3}
    assert (len(store), store.written) == (2, 2)
    assert files(tmp_path, "data")[0].stat().st_size == 2 * SIZE, "no record is written twice"


def test_what_another_has_written_is_found_after_a_refresh(tmp_path: Path) -> None:
    ours, theirs = filled(tmp_path, 0), filled(tmp_path, 1)
    assert found(ours) == {0}
    ours.refresh()
    assert found(ours) == {0, 1}
    theirs.write({key(2): record(2)})
    ours.refresh()
    assert found(ours) == {0, 1, 2}
    assert len(files(tmp_path, "data")) == 2


@pytest.mark.parametrize("kind", ["data", "index"])
def test_a_file_cut_short_anywhere_loses_records_and_gives_no_wrong_one(tmp_path: Path, kind: str) -> None:
    filled(tmp_path, 0, 1, 2)
    (path,) = files(tmp_path, kind)
    whole, one = path.read_bytes(), SIZE if kind == "data" else _ENTRY.size
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert found(opened(tmp_path)) == set(range(length // one))


@pytest.mark.parametrize("kind", ["data", "index"])
def test_a_byte_that_differs_loses_its_record(tmp_path: Path, kind: str) -> None:
    filled(tmp_path, 0, 1, 2)
    (path,) = files(tmp_path, kind)
    whole, one = path.read_bytes(), SIZE if kind == "data" else _ENTRY.size
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        store = opened(tmp_path)
        assert found(store) == {0, 1, 2} - {place // one}
        assert store.broken == (not one <= _ENTRY.size or place % one >= 32), "a damaged key is one nobody asks for"


def test_records_that_changed_places_are_not_found(tmp_path: Path) -> None:
    """Whole, and of the right size, but another's: of another key or from another folder's shard."""
    filled(tmp_path, 0, 1)
    (data,), (index,) = files(tmp_path, "data"), files(tmp_path, "index")
    data.write_bytes(record(1) + record(0))
    assert found(opened(tmp_path)) == set()
    entry = _ENTRY.pack(key(2), checksum(key(1), record(1)), 0, SIZE)
    index.write_bytes(entry)
    assert found(opened(tmp_path)) == set()


def test_a_damaged_record_is_replaced(tmp_path: Path, caplog) -> None:
    filled(tmp_path, 0, 1)
    (path,) = files(tmp_path, "data")
    path.write_bytes(bytes(SIZE) + path.read_bytes()[SIZE:])
    store = opened(tmp_path)
    assert found(store) == {1}
    assert "damaged" in caplog.text
    store.write({key(0): record(0)})
    assert found(store) == found(opened(tmp_path)) == {0, 1}


def test_a_file_that_is_cut_short_while_it_is_read_kills_nobody(tmp_path: Path) -> None:
    """Beyond the end of a file a memory map is no memory."""
    filled(tmp_path, *range(100))
    store = opened(tmp_path)
    assert found(store) == set(range(20))
    os.truncate(files(tmp_path, "data")[0], 5 * SIZE)
    assert found(store) == set(range(5))
    store.prefetch(map(key, range(100)))
    files(tmp_path, "data")[0].unlink()
    assert found(store) == set(range(5)), "an open file stays"
    assert found(opened(tmp_path)) == set()


def test_no_more_is_kept_than_there_is_room_for(tmp_path: Path, caplog) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "x.data").write_bytes(bytes(1000))
    limit = 1000 + 3 * (SIZE + _ENTRY.size) + 10
    store = opened(tmp_path, limit)
    store.write({key(n): record(n) for n in range(2)})
    store.write({key(n): record(n) for n in range(5)})
    store.write({key(9): record(9)})
    assert found(store) == {0, 1, 2}
    assert limit - 20 < size(tmp_path) <= limit
    assert caplog.text.count("gigabytes allows") == 1


def test_a_folder_that_cannot_be_written_keeps_nothing_and_says_so(tmp_path: Path, caplog) -> None:
    (tmp_path / "one").write_text("a file")
    store = opened(tmp_path)
    for number in range(3):
        store.write({key(number): record(number)})
    assert found(store) == set()
    assert caplog.text.count("nothing more is kept") == 1


def test_a_process_that_was_forked_writes_a_shard_of_its_own(tmp_path: Path) -> None:
    store = filled(tmp_path, 0)
    if not (child := os.fork()):
        store.write({key(1): record(1)})
        os._exit(0)
    os.waitpid(child, 0)
    store.write({key(2): record(2)})
    assert len(files(tmp_path, "data")) == 2
    assert found(store) == found(opened(tmp_path)) == {0, 1, 2}


class Writer:
    """A process that writes records ``first`` to ``first + count``, four at a time, and tells of each four."""

    def __init__(self, folder: Path, first: int, count: int):
        told, tell = os.pipe()
        if not (process := os.fork()):
            store = opened(folder)
            for start in range(first, first + count, 4):
                store.write({key(n): record(n) for n in range(start, start + 4)})
                os.write(tell, f"{start}\n".encode())
            os._exit(0)
        os.close(tell)
        self.process, self.told = process, open(told)  # noqa: SIM115

    def end(self) -> int:
        self.told.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def test_processes_that_fill_it_side_by_side_do_not_disturb_each_other(tmp_path: Path) -> None:
    writers = [Writer(tmp_path, first, 400) for first in (0, 200, 200)]
    assert [len(each.told.readlines()) for each in writers] == [100, 100, 100]
    assert [each.end() for each in writers] == [0, 0, 0]
    assert found(opened(tmp_path), 700) == set(range(600))
    assert len(files(tmp_path, "data")) >= 2


def test_a_process_that_is_killed_leaves_what_it_had_written(tmp_path: Path) -> None:
    """At many moments; what it said to be written is there, and no record is wrong."""
    told = set()
    for turn, lines in enumerate((1, 2, 3, 5, 8, 13, 17, 60, 200, 201)):
        writer = Writer(tmp_path, 100_000 * turn, 100_000)
        for _ in range(lines):
            start = int(writer.told.readline())
            told |= set(range(start, start + 4))
        os.kill(writer.process, signal.SIGKILL)
        assert writer.end() == -signal.SIGKILL
        store = opened(tmp_path)
        assert all(store.read(key(n)) == record(n) for n in told)
        after = max(told) + 1
        assert all(store.read(key(n)) in (None, record(n)) for n in range(after, after + 100))
        assert store.broken == 0
