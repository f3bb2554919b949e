"""Commands that show what there is: list, show, inspect."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from shared.commands.options import Add

LISTS = {"methods": "method", "backbones": "backbone", "data": "data", "heads": "head", "tasks": "task", "recipes": ""}


def add_to(add: Add) -> None:
    """The commands and their options."""
    listing = add("list", "List what there is.", _list)
    listing.add_argument("what", choices=LISTS, help=", ".join(LISTS), metavar="WHAT")
    listing.add_argument("filters", metavar="key=value", nargs="*", help="of methods, such as mergeable=yes")
    listing.add_argument("--json", action="store_true", help="print JSON")
    add("show", "Show a class with its settings, or the text of a recipe.", _show).add_argument("what", metavar="NAME")
    add("inspect", "Show what an adapter file holds.", _inspect).add_argument("file", metavar="FILE", type=Path)


def _list(asked: argparse.Namespace) -> None:
    from shared import listing

    rows = listing.rows(LISTS[asked.what], asked.filters)
    if asked.json:
        print(json.dumps(rows))
        return
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    print("\n".join(listing.lines(rows, columns)))


def _show(asked: argparse.Namespace) -> None:
    from shared import facts

    facts.show(asked.what)


def _inspect(asked: argparse.Namespace) -> None:
    from shared import facts

    facts.inspect(asked.file)
