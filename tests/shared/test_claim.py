"""Claims: of many processes one holds a directory, whoever is first; a killed one holds nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from shared.claim import CLAIM, claimed, is_empty
from shared.errors import RequestError, WorkError


def racing(folder: Path, count: int, start: float) -> list[int]:
    """``count`` processes claim ``folder`` at one moment; the exit status of each: 0 held it, 2 was refused."""
    children = []
    for number in range(count):
        if not (pid := os.fork()):
            status = 9
            try:
                while time.time() < start:
                    pass
                with claimed(folder, fresh=True):
                    (folder / f"work{number}").touch()
                    time.sleep(0.005 * number)
                status = 0
            except RequestError:
                status = 2
            finally:
                os._exit(status)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def test_of_many_processes_one_gets_the_directory(tmp_path):
    for turn in range(10):
        folder = tmp_path / "runs" / str(turn)
        if turn % 2:
            folder.mkdir(parents=True)
        found = racing(folder, 6, time.time() + 0.02)
        assert sorted(found) == [0, 2, 2, 2, 2, 2]
        assert [path.name for path in folder.iterdir()] == [f"work{found.index(0)}"]


def test_a_claim_ends_with_its_block_and_leaves_nothing(tmp_path):
    with claimed(tmp_path / "a" / "b", fresh=True):
        assert is_empty(tmp_path / "a" / "b")
        assert (tmp_path / "a" / "b" / CLAIM).exists()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), claimed(tmp_path / "a", fresh=True):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").mkdir()
    with claimed(tmp_path / "kept", fresh=True):
        pass
    assert list((tmp_path / "kept").iterdir()) == []


def test_what_another_process_left_is_not_written_over(tmp_path):
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(RequestError, match="another process has filled it meanwhile"), claimed(tmp_path, fresh=True):
        raise AssertionError
    with claimed(tmp_path, fresh=False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_claim_that_a_kill_left_is_free(tmp_path):
    (tmp_path / CLAIM).touch()
    assert is_empty(tmp_path)
    with claimed(tmp_path, fresh=True):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    refused = pytest.raises(WorkError, match=r"file/run: cannot be written: Not a directory")
    with refused, claimed(tmp_path / "file" / "run", fresh=True):
        raise AssertionError
