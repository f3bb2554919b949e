"""How the options of commands are parsed, and refused in one line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, NoReturn

from shared.errors import RequestError

Do = Callable[[argparse.Namespace], None]


class Parser(argparse.ArgumentParser):
    """What cannot be parsed is a wrong request, not the end of the process."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} ({self.prog} --help shows how)")


# add(name, what the command does, the function that does it, options that it shares with others): its own options.
Add = Callable[..., Parser]


def names(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def numbers(text: str) -> list[int]:
    if not all(word.isdigit() for word in names(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: wants whole numbers with commas between")
    return [int(word) for word in names(text)]


def settings(text: str) -> dict[str, Any]:
    """Numbers by name."""
    found = {}
    for word in names(text):
        name, _, value = word.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word!r}: wants key=value,… with numbers") from None
    return found
