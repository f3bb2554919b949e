"""A script's ``main`` says what was asked wrongly in one line, and only that."""

from __future__ import annotations

import pytest

from shared.errors import RequestError, WorkError, exit_status


@exit_status
def main(error: Exception | None) -> None:
    """What the script does."""
    if error is not None:
        raise error


def test_the_exit_status_of_a_script(capsys):
    assert main(None) == 0
    assert main(RequestError("recipe.yaml: no such file")) == 2
    assert capsys.readouterr().err == "error: recipe.yaml: no such file\n"
    with pytest.raises(WorkError, match="disk full"):
        main(WorkError("disk full"))
    assert (main.__name__, main.__doc__) == ("main", "What the script does.")
