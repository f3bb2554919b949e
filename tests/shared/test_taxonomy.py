"""Every method has a place on the map of the field, and the map is closed."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from shared import catalog, cli
from shared.errors import RequestError
from shared.taxonomy import CATEGORIES, Record

LORA = {"acts_on": "weights", "form": "parallel", "mergeable": "yes", "trains": "rank"}


def test_every_method_has_a_record_that_python_reads_alike():
    for entry in catalog.entries("method"):
        assert entry.record is not None, f"{entry.name} has no record"
        assert entry.record == entry.load().record
        assert set(entry.record.categories) <= set(CATEGORIES)


def test_every_system_named_has_its_page(materials):
    for entry in catalog.entries("method"):
        assert entry.record is not None
        if entry.record.spec:
            assert (materials / "spec" / f"{entry.record.spec}.md").is_file(), entry.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": ("additive/adaptor",)}, "says 'additive/adaptor'; known are additive/adapter"),
        ({"categories": ()}, "names no category"),
        ({"mergeable": "maybe"}, "says 'maybe'; known are yes, no, conditional"),
        ({"acts_on": "bias"}, "says 'bias'; known are weights"),
    ],
)
def test_a_record_outside_the_closed_lists_is_an_error(change, message):
    with pytest.raises(RequestError, match=message):
        Record(**{"categories": ("hybrid",), **LORA, **change})


def test_listing_imports_no_method():
    code = (
        "import sys; from shared import catalog; catalog.entries('method');"
        "assert not any(m.startswith('shared.methods') or m == 'torch' for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_methods_are_listed_by_category_and_filtered(capsys):
    assert cli.main(["list", "methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    headings = [line for line in lines if line and not line.startswith(" ")]
    assert headings == [c for c in CATEGORIES if c in headings]
    below = lines[lines.index("reparameterised/low-rank") + 1 :]
    listed_there = itertools.takewhile(lambda line: line.startswith(" "), below)
    assert "LoRA" in [line.split()[0] for line in listed_there]
    assert cli.main(["list", "methods", "mergeable=yes", "modality=any"]) == 0
    listed = capsys.readouterr().out
    assert "LoRA" in listed
    assert "CloudAdapter" not in listed
    assert cli.main(["list", "methods", "backward=no"]) == 0
    assert "Probe" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["methods", "merge=yes"], "no method has a 'merge'; nearest: 'mergeable'"),
        (["methods", "mergeable=perhaps"], "no method has mergeable=perhaps; there are"),
        (["backbones", "mergeable=yes"], "only methods can be filtered"),
    ],
)
def test_a_wrong_filter_is_one_line(capsys, words, message):
    assert cli.main(["list", *words]) == 2
    assert message in capsys.readouterr().err
