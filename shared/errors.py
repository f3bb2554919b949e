"""The two ways a user meets a failure: what was asked cannot be done, or the work itself failed."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

Arguments = ParamSpec("Arguments")


class RequestError(ValueError):
    """What was asked is wrong (a recipe, a file, an argument); the command line exits with status 2."""


class WorkError(RuntimeError):
    """The work was well asked and failed on the way; the command line exits with status 1."""


def exit_status(main: Callable[Arguments, None]) -> Callable[Arguments, int]:
    """A script's ``main`` that returns 0, or says a ``RequestError`` in one line and returns 2."""

    @functools.wraps(main)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> int:
        try:
            main(*args, **kwargs)
        except RequestError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    return run
