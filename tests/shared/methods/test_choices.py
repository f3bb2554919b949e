"""A setting that takes one of a few words refuses every other in one line, for every method."""

from __future__ import annotations

import typing
from collections.abc import Sequence

import pytest

from shared import catalog
from shared.errors import RequestError
from shared.method import check_choices


def closed() -> list[tuple[str, str]]:
    """Methods that need no setting, with their settings whose type names a Literal."""
    found = [e for e in catalog.entries("method") if not any(a.required for a in e.arguments)]
    return [(entry.name, a.name) for entry in found for a in entry.arguments if "Literal" in a.type]


def test_there_are_many():
    assert len(closed()) > 30


@pytest.mark.parametrize(("name", "setting"), closed())
def test_another_word_is_refused_and_the_default_is_not(name, setting):
    kind = catalog.find(name, "method").load()
    check_choices(kind())
    many = typing.get_origin(typing.get_type_hints(kind)[setting]) is Sequence
    with pytest.raises(RequestError, match=rf"{setting} .*bogus|{setting}.*bogus|bogus.*use"):
        check_choices(kind(**{setting: ["bogus"] if many else "bogus"}))


def test_a_number_or_a_word():
    from shared.methods import ParallelAdapter

    check_choices(ParallelAdapter(scale=2))
    check_choices(ParallelAdapter(scale="learned"))
    with pytest.raises(RequestError, match="ParallelAdapter scale 'half': use a number or learned"):
        check_choices(ParallelAdapter(scale="half"))
