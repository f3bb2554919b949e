"""Bad input: one clear line that names the file or key, the right exit status, and everything as it was before.

The tables, in ``bad_files`` and ``bad_requests``, hold the command, what it must say, and what is done before to a
small world of good files. What is odd but legal is in ``test_odd_input``, what stops good work in ``test_stopped``.
"""

from __future__ import annotations

import re
from contextlib import nullcontext

import pytest

from tests.reliability.bad_files import BANDS, DAMAGED, MESSY
from tests.reliability.bad_requests import PLACES, REQUESTS
from tests.reliability.spoils import Case
from tests.reliability.world import World, without_privilege

TABLES = {"messy": MESSY, "damaged": DAMAGED, "bands": BANDS, "places": PLACES, "requests": REQUESTS}
CASES = {f"{title}: {name}": case for title, table in TABLES.items() for name, case in table.items()}


def refused(world: World, case: Case, capsys: pytest.CaptureFixture[str]) -> str:
    """Spoil the world, run the command, check all that must hold, and give the line."""
    case.spoil(world)
    before = world.content()
    with without_privilege() if re.search("Permission", case.message) else nullcontext():
        status = world.main(case.command)
    said = capsys.readouterr().err
    assert status == case.status, said
    assert len(said.splitlines()) == 1, said
    assert re.search(case.message, said), said
    assert said.startswith("omniadapt: ")
    assert "Traceback" not in said
    assert "--debug" not in said, "a line of ours, not an exception that went through"
    after = world.content()
    if "--resume" in case.command:  # a run that goes on logs what stopped it
        assert after["run/log.txt"].startswith(before.pop("run/log.txt"))
        del after["run/log.txt"]
    assert after == before
    return said


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bad_input_is_one_line_and_changes_nothing(world, case, capsys):
    refused(world, case, capsys)


def test_the_table_is_long():
    assert sum(map(len, TABLES.values())) == len(CASES) >= 60


def growing(world: World) -> None:
    """Whenever it is looked at the world holds more."""
    found = iter(range(9))
    world.content = lambda: {"files": next(found)}  # type: ignore[method-assign]


GOOD = Case("inspect {run}/adapter.safetensors", "")
WRONG = {
    "no refusal": GOOD,
    "another status": Case("inspect {root}/away", "no such file", status=1),
    "another line": Case("inspect {root}/away", "empty"),
    "two lines": Case("run {recipe} a=1 b=2 --output {out}", "no such section"),
    "something left behind": Case("inspect {root}/away", "no such file", growing),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_the_check_itself_can_fail(world, case, capsys):
    with pytest.raises(AssertionError):
        refused(world, case, capsys)
