"""Reading ahead: the same pixels in the same order, by another thread, which ends with the work."""

from __future__ import annotations

import threading

import pytest

from shared.errors import RequestError
from shared.mapping.blending import _ahead


def test_the_next_is_read_while_this_one_is_worked_on():
    read: list[int] = []
    second = threading.Event()

    def reading(number: int) -> int:
        read.append(number)
        if len(read) == 2:
            second.set()
        return number * number

    pixels = _ahead(reading, [(number,) for number in range(5)])
    assert next(pixels) == 0
    assert second.wait(30)
    assert read == [0, 1]
    assert list(pixels) == [1, 4, 9, 16]
    assert list(_ahead(reading, [])) == []


def test_an_error_of_reading_comes_where_its_pixels_would():
    def reading(number: int) -> int:
        if number == 1:
            raise RequestError("broken off")
        return number

    pixels = _ahead(reading, [(0,), (1,), (2,)])
    assert next(pixels) == 0
    with pytest.raises(RequestError, match="broken off"):
        next(pixels)


def test_work_that_stops_leaves_no_thread():
    before = threading.active_count()
    pixels = _ahead(lambda number: number, [(number,) for number in range(5)])
    next(pixels)
    assert threading.active_count() > before
    pixels.close()
    assert threading.active_count() == before
