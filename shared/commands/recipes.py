"""Commands on recipes: run, compare, count, plan, import."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from shared.commands.options import Add, Parser, names, numbers
from shared.errors import RequestError


def add_to(add: Add) -> None:
    """The commands and their options."""
    recipe = Parser(add_help=False)
    recipe.add_argument("recipe", metavar="RECIPE", help="a recipe file, or a name that 'list recipes' shows")
    recipe.add_argument("overrides", metavar="key=value", nargs="*", help="settings to change, such as method.rank=16")
    recipe.add_argument("--tiny", action="store_true", help="the recipe's small trial settings")
    output = Parser(add_help=False)
    output.add_argument("--output", metavar="DIR", type=Path, help="where to write (default: below runs/)")
    run = add("run", "Train what a recipe describes and write a run directory.", _run, recipe, output)
    run.add_argument("--resume", action="store_true", help="go on with the run in --output, or with the recipe's last")
    compare = add("compare", "Train a recipe with several methods and compare them.", _compare, recipe, output)
    compare.add_argument("--methods", type=names, default=[], help="such as probe,lora,full; all: every one that fits")
    compare.add_argument("--seeds", type=numbers, default=[], help="such as 0,1,2 (default: the recipe's)")
    compare.add_argument("--folds", metavar="N", type=int, help="cross-validation: train on N splits, score all as one")
    compare.add_argument("--resume", action="store_true", help="keep the finished runs that --output holds")
    count = add("count", "Count a recipe's parameters without loading weights or data.", _count, recipe)
    count.add_argument("--json", action="store_true", help="print JSON")
    what = "Predict what a recipe's training costs on this machine, from a few of its batches."
    plan = add("plan", what, _plan, recipe)
    plan.add_argument("--json", action="store_true", help="print JSON")
    imports = add("import", "Make an adapter file for a recipe's backbone from another library's.", _import)
    imports.add_argument("recipe", metavar="RECIPE", help="a recipe file, or a name that 'list recipes' shows")
    imports.add_argument("file", metavar="FILE", type=Path, help="of peft, kohya, LyCORIS, diffusers or AdapterHub")
    imports.add_argument("overrides", metavar="key=value", nargs="*", help="settings to change")
    imports.add_argument("--tiny", action="store_true", help="the recipe's small trial settings")
    imports.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="the adapter file")
    imports.add_argument("--skip", metavar="WORD,WORD", type=names, default=[], help="tensors to leave out: a head's")


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


def _count(asked: argparse.Namespace) -> None:
    chosen = _recipe(asked, files=False)
    from shared import run

    found = run.count(chosen)
    if asked.json:
        print(json.dumps(found))
        return
    for role in ("trainable", "adapter", "head", "frozen"):
        indent = "  " if role in ("adapter", "head") else ""
        print(f"{indent + role:<12}{found[role]:>15,}")


def _plan(asked: argparse.Namespace) -> None:
    chosen = _recipe(asked)
    from shared import forecast
    from shared.report.terminal import print_table

    found = forecast.forecast(chosen)
    if asked.json:
        print(json.dumps(found))
        return
    print_table(("predicted", ""), forecast.rows(found))
    print("\n".join(found["advice"]))


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
