"""Commands on finished runs: predict, generate, push, pull, export."""

from __future__ import annotations

import argparse
from pathlib import Path

from shared import generation
from shared.commands.options import Add, numbers, settings
from shared.errors import RequestError

KINDS = ("classes", "probabilities", "polygons", "maps", "images", "texts")  # not every task writes every one


def add_to(add: Add) -> None:
    """The commands and their options."""
    predict = add("predict", "Predict for files, such as rasters of any size, with a trained run.", _predict)
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
    predict.add_argument("--bands", metavar="N,N", type=numbers, help="which bands to read, whatever their names")
    predict.add_argument("--reproject", action="store_true", help="bring a second date to the grid of the first")
    predict.add_argument(
        "--prompts",
        metavar="PATH",
        type=Path,
        help="JSON or CSV of points and boxes (default: NAME.prompts.json or .csv)",
    )
    predict.add_argument("--generator", metavar="key=value,…", type=settings, help="such as points_per_side=16 (SAM)")
    predict.add_argument("--overwrite", action="store_true", help="replace what is there")
    generate = add("generate", "Make images, views or videos with a recipe's or a finished run's model.", _generate)
    generation.add_options(generate)
    push = add("push", "Upload a finished run, with a model card, to a repository of the Hugging Face Hub.", _push)
    push.add_argument("run", metavar="RUN", type=Path, help="the directory of a finished run")
    push.add_argument("repository", metavar="OWNER/NAME", help="the repository, made where there is none")
    push.add_argument("--license", required=True, metavar="ID", help="of the adapter, such as apache-2.0")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--folder", metavar="DIR", type=Path, help="write the files to DIR and upload nothing")
    pull = add("pull", "Fetch a run from a repository of the Hugging Face Hub.", _pull)
    pull.add_argument("repository", metavar="OWNER/NAME[@REVISION]", help="the repository")
    pull.add_argument("--output", metavar="DIR", type=Path, help="where to write (default: NAME)")
    export = add("export", "Write a finished run's adapter as other libraries read it.", _export)
    export.add_argument("run", metavar="RUN", type=Path, help="the directory of a finished run, or hf://owner/name")
    export.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="a folder for its files")
    formats = ("peft", "kohya", "diffusers", "adapterhub")
    export.add_argument("--as", dest="kind", choices=formats, required=True, help="the format")
    export.add_argument("--prefix", metavar="TEXT", help="what stands before the layers' names, such as model.")


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
