"""The command line: parses, calls one function a command, and turns failures into one line and an exit status."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from shared import generation
from shared.errors import RequestError, WorkError

KINDS = ("classes", "probabilities", "polygons", "maps", "images", "texts")  # not every task writes every one
LISTS = {"methods": "method", "backbones": "backbone", "data": "data", "heads": "head", "tasks": "task", "recipes": ""}


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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} ({self.prog} --help shows how)")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    asked, rest = _parser().parse_known_args(arguments)
    # argparse takes no positional after an option: overrides may stand anywhere
    if unknown := [word for word in rest if word.startswith("-") or not hasattr(asked, "overrides")]:
        raise RequestError(f"unknown argument {unknown[0]!r} (omniadapt {asked.name} --help shows how)")
    if hasattr(asked, "overrides"):
        asked.overrides += rest
    return asked


def _parser() -> _Parser:
    debug = _Parser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    parser = _Parser(
        prog="omniadapt",
        description="Adapt frozen foundation models to a domain by training a few small modules around them.",
        epilog="Start with: omniadapt list recipes",
    )
    commands = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)

    def add(name: str, what: str, *options: _Parser) -> _Parser:
        command = commands.add_parser(name, help=what, description=what, parents=[debug, *options], allow_abbrev=False)
        command.set_defaults(command=globals()[f"_{name}"])
        return command

    _on_recipes(add)
    _on_runs(add)
    _on_facts(add)
    return parser


def _on_recipes(add: Callable[..., _Parser]) -> None:
    recipe = _Parser(add_help=False)
    recipe.add_argument("recipe", metavar="RECIPE", help="a recipe file, or a name that 'list recipes' shows")
    recipe.add_argument("overrides", metavar="key=value", nargs="*", help="settings to change, such as method.rank=16")
    recipe.add_argument("--tiny", action="store_true", help="the recipe's small trial settings")
    output = _Parser(add_help=False)
    output.add_argument("--output", metavar="DIR", type=Path, help="where to write (default: below runs/)")
    run = add("run", "Train what a recipe describes and write a run directory.", recipe, output)
    run.add_argument("--resume", action="store_true", help="go on with the run in --output, or with the recipe's last")
    compare = add("compare", "Train a recipe with several methods and compare them.", recipe, output)
    compare.add_argument("--methods", type=_names, default=[], help="such as probe,lora,full; all: every one that fits")
    compare.add_argument("--seeds", type=_numbers, default=[], help="such as 0,1,2 (default: the recipe's)")
    compare.add_argument("--folds", metavar="N", type=int, help="cross-validation: train on N splits, score all as one")
    compare.add_argument("--resume", action="store_true", help="keep the finished runs that --output holds")
    count = add("count", "Count a recipe's parameters without loading weights or data.", recipe)
    count.add_argument("--json", action="store_true", help="print JSON")
    plan = add("plan", "Predict what a recipe's training costs on this machine, from a few of its batches.", recipe)
    plan.add_argument("--json", action="store_true", help="print JSON")
    imports = add("import", "Make an adapter file for a recipe's backbone from another library's.")
    imports.add_argument("recipe", metavar="RECIPE", help="a recipe file, or a name that 'list recipes' shows")
    imports.add_argument("file", metavar="FILE", type=Path, help="of peft, kohya, LyCORIS, diffusers or AdapterHub")
    imports.add_argument("overrides", metavar="key=value", nargs="*", help="settings to change")
    imports.add_argument("--tiny", action="store_true", help="the recipe's small trial settings")
    imports.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="the adapter file")
    imports.add_argument("--skip", metavar="WORD,WORD", type=_names, default=[], help="tensors to leave out: a head's")


def _on_runs(add: Callable[..., _Parser]) -> None:
    predict = add("predict", "Predict for files, such as rasters of any size, with a trained run.")
    predict.add_argument("run", metavar="RUN", type=Path, help="the directory of a finished run, or hf://owner/name")
    predict.add_argument("inputs", metavar="INPUT", nargs="+", type=Path, help="files, and folders of files")
    predict.add_argument(
        "-o", "--output", metavar="OUT", type=Path, required=True, help="a file for one, else a folder"
    )
    predict.add_argument("--as", dest="kind", choices=KINDS, metavar="KIND", help="what to write: " + ", ".join(KINDS))
    predict.add_argument("--top", metavar="N", type=int, help="how many a ranked list has (default: 10)")
    predict.add_argument("--task", metavar="NAME", help="which of the tasks of a run that has several")
    predict.add_argument("--ensemble", metavar="SHARE", type=float, help="of the tuned model, 0 is zero-shot (CLIP)")
    predict.add_argument("--window", metavar="N", type=int, help="pixels a side (default: as trained)")
    predict.add_argument("--overlap", metavar="N", type=int, help="pixels neighbours share (default: half a window)")
    predict.add_argument("--bands", metavar="N,N", type=_numbers, help="which bands to read, whatever their names")
    predict.add_argument("--reproject", action="store_true", help="bring a second date to the grid of the first")
    predict.add_argument(
        "--prompts",
        metavar="PATH",
        type=Path,
        help="JSON or CSV of points and boxes (default: NAME.prompts.json or .csv)",
    )
    predict.add_argument("--generator", metavar="key=value,…", type=_settings, help="such as points_per_side=16 (SAM)")
    predict.add_argument("--overwrite", action="store_true", help="replace what is there")
    generation.add_options(add("generate", "Make images, views or videos with a recipe's or a finished run's model."))
    push = add("push", "Upload a finished run, with a model card, to a repository of the Hugging Face Hub.")
    push.add_argument("run", metavar="RUN", type=Path, help="the directory of a finished run")
    push.add_argument("repository", metavar="OWNER/NAME", help="the repository, made where there is none")
    push.add_argument("--license", required=True, metavar="ID", help="of the adapter, such as apache-2.0")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--folder", metavar="DIR", type=Path, help="write the files to DIR and upload nothing")
    pull = add("pull", "Fetch a run from a repository of the Hugging Face Hub.")
    pull.add_argument("repository", metavar="OWNER/NAME[@REVISION]", help="the repository")
    pull.add_argument("--output", metavar="DIR", type=Path, help="where to write (default: NAME)")
    export = add("export", "Write a finished run's adapter as other libraries read it.")
    export.add_argument("run", metavar="RUN", type=Path, help="the directory of a finished run, or hf://owner/name")
    export.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="a folder for its files")
    formats = ("peft", "kohya", "diffusers", "adapterhub")
    export.add_argument("--as", dest="kind", choices=formats, required=True, help="the format")
    export.add_argument("--prefix", metavar="TEXT", help="what stands before the layers' names, such as model.")


def _on_facts(add: Callable[..., _Parser]) -> None:
    listing = add("list", "List what there is.")
    listing.add_argument("what", choices=LISTS, help=", ".join(LISTS), metavar="WHAT")
    listing.add_argument("filters", metavar="key=value", nargs="*", help="of methods, such as mergeable=yes")
    listing.add_argument("--json", action="store_true", help="print JSON")
    add("show", "Show a class with its settings, or the text of a recipe.").add_argument("what", metavar="NAME")
    add("inspect", "Show what an adapter file holds.").add_argument("file", metavar="FILE", type=Path)


def _names(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _numbers(text: str) -> list[int]:
    if not all(word.isdigit() for word in _names(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: wants whole numbers with commas between")
    return [int(word) for word in _names(text)]


def _settings(text: str) -> dict[str, Any]:
    """Numbers by name."""
    found = {}
    for word in _names(text):
        name, _, value = word.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word!r}: wants key=value,… with numbers") from None
    return found


def _recipe(asked: argparse.Namespace, *, files: bool = True) -> Any:
    """The recipe that a command names, checked; called before torch is imported, so that a slip costs no wait."""
    from shared import recipe

    return recipe.load(asked.recipe, asked.overrides, tiny=asked.tiny, files=files)


def _run(asked: argparse.Namespace) -> None:
    chosen = _recipe(asked)
    from shared import run
    from shared.report.terminal import print_run
    from shared.training.processes import rank

    folder = run.directory(chosen, asked.output, resume=asked.resume)
    found = run.run(chosen, folder, resume=asked.resume)
    if rank() == 0:
        print_run(found)
        print(f"page: {folder / run.PAGE}")


def _compare(asked: argparse.Namespace) -> None:
    from shared.training.processes import launched

    if launched():
        raise RequestError("compare starts its processes itself: call it without torchrun, with trainer.devices=N")
    if asked.resume and asked.output is None:
        raise RequestError("compare --resume: name the directory of the comparison with --output")
    chosen = _recipe(asked)
    from shared import compare

    compare.compare(chosen, asked.methods, asked.seeds, asked.output, folds=asked.folds, resume=asked.resume)


def _predict(asked: argparse.Namespace) -> None:
    from shared import run

    trained = run.load(asked.run)
    options = {name: getattr(asked, name) for name in ("kind", "window", "overlap", "bands", "overwrite")}
    if getattr(trained.task, "tasks", ()):
        options["task"] = asked.task
    elif asked.task is not None:
        raise RequestError(f"--task {asked.task}: {asked.run} has one task, which has no name")
    if hasattr(trained.task, "ensemble"):
        options["ensemble"] = asked.ensemble
    elif asked.ensemble is not None:
        raise RequestError(f"--ensemble {asked.ensemble:g}: {asked.run} has no zero-shot model to be between")
    if hasattr(trained.task, "top"):
        options["top"] = asked.top
    elif asked.top is not None:
        raise RequestError(f"--top {asked.top}: {asked.run} ranks nothing")
    if getattr(trained.task, "dates", 1) > 1:
        options["reproject"] = asked.reproject
    elif asked.reproject:
        raise RequestError(f"--reproject: {asked.run} reads no second date")
    if getattr(trained.task, "promptable", False):
        options |= {"prompts": asked.prompts, "generator": asked.generator}
    elif asked.prompts is not None or asked.generator is not None:
        raise RequestError(f"--prompts and --generator: {asked.run} answers no prompts")
    trained.task.predict_files(
        asked.inputs, asked.output, described=trained.described, identity=trained.identity, **options
    )


def _generate(asked: argparse.Namespace) -> None:
    print(f"page: {generation.generate(asked)}")


def _push(asked: argparse.Namespace) -> None:
    from shared import hub

    if asked.folder is None:
        print(hub.push(asked.run, asked.repository, licence=asked.license, private=asked.private))
        return
    hub.write(asked.run, asked.repository, asked.folder, licence=asked.license)
    print(asked.folder)


def _pull(asked: argparse.Namespace) -> None:
    from shared import hub

    address = hub.Address.of(asked.repository)
    folder = asked.output or Path(address.repository.rpartition("/")[2])
    hub.pull(address, folder)
    print(folder)


def _export(asked: argparse.Namespace) -> None:
    from shared import interop, run

    print(*interop.export_adapter(run.load(asked.run).task.model, asked.output, format=asked.kind, prefix=asked.prefix))


def _import(asked: argparse.Namespace) -> None:
    if asked.output.exists():
        raise RequestError(f"{asked.output}: it is there already; name another file")
    chosen = _recipe(asked, files=False)
    from shared import Adapted, interop, run

    run.seed(chosen.seed)
    model = Adapted(chosen.build("backbone", bands=chosen.outline().bands))
    interop.import_adapter(model, asked.file, skip=asked.skip)
    model.save(asked.output)
    print(asked.output)


def _count(asked: argparse.Namespace) -> None:
    chosen = _recipe(asked, files=False)
    from shared import run

    numbers = run.count(chosen)
    if asked.json:
        print(json.dumps(numbers))
        return
    for role in ("trainable", "adapter", "head", "frozen"):
        indent = "  " if role in ("adapter", "head") else ""
        print(f"{indent + role:<12}{numbers[role]:>15,}")


def _plan(asked: argparse.Namespace) -> None:
    from shared import forecast, recipe
    from shared.report.terminal import print_table

    found = forecast.forecast(recipe.load(asked.recipe, asked.overrides, tiny=asked.tiny))
    if asked.json:
        print(json.dumps(found))
        return
    print_table(("predicted", ""), forecast.rows(found))
    print("\n".join(found["advice"]))


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
