"""The command line: parses, calls one function a command, and turns failures into one line and an exit status.

The options of each command stand beside what it does, in ``shared.commands``.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from shared.commands import facts, recipes, runs
from shared.commands.options import Do, Parser
from shared.errors import RequestError, WorkError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0 done, 1 the work failed, 2 the request was wrong, 130 interrupted."""
    # Threads that wait sleep: spinning ones make small models many times slower wherever something else is running.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns, in every process, of what is meant to be so
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        asked = _parse(arguments)
        asked.command(asked)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # what Lightning makes of Ctrl-C
            return _say("interrupted (--resume goes on from the last checkpoint)", 130)
        raise
    except BrokenPipeError:  # the reader of our output has gone; nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if "--debug" in arguments:
            raise
        if isinstance(error, (RequestError, WorkError)):
            return _say(str(error), 2 if isinstance(error, RequestError) else 1)
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            return _say(f"{os.fsdecode(error.filename)}: {error.strerror} (--debug shows where)", 1)
        return _say(f"{type(error).__name__}: {' '.join(str(error).split())} (--debug shows where)", 1)


def _say(message: str, status: int) -> int:
    message = message.encode(errors="backslashreplace").decode()  # names of files may hold bytes that are no text
    print(f"omniadapt: {message}", file=sys.stderr)
    return status


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    asked, rest = _parser().parse_known_args(arguments)
    # argparse takes no positional after an option: overrides may stand anywhere
    if unknown := [word for word in rest if word.startswith("-") or not hasattr(asked, "overrides")]:
        raise RequestError(f"unknown argument {unknown[0]!r} (omniadapt {asked.name} --help shows how)")
    if hasattr(asked, "overrides"):
        asked.overrides += rest
    return asked


def _parser() -> Parser:
    debug = Parser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    parser = Parser(
        prog="omniadapt",
        description="Adapt frozen foundation models to a domain by training a few small modules around them.",
        epilog="Start with: omniadapt list recipes",
    )
    commands = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)

    def add(name: str, what: str, do: Do, *options: Parser) -> Parser:
        command = commands.add_parser(name, help=what, description=what, parents=[debug, *options], allow_abbrev=False)
        command.set_defaults(command=do)
        return command

    for group in (recipes, runs, facts):
        group.add_to(add)
    return parser
