"""``omniadapt generate``: what is asked for is checked, a task makes it, and a folder with a page is written."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from shared.errors import RequestError

if TYPE_CHECKING:
    from shared.generating import Wanted

LARGEST = 8192  # pixels of a side
GRAIN = 8  # sides are multiples of it, pixels
MOST = {"count": 10_000, "views": 1000, "frames": 10_000, "steps": 1000}
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # Pillow's modes that are read


def add_options(command: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add = command.add_argument
    add("target", metavar="RECIPE|RUN", help="a recipe, the directory of a finished run, or hf://owner/name")
    add("overrides", metavar="key=value", nargs="*", help="settings of the recipe to change")
    add("--prompt", metavar="TEXT", default="", help="what to show")
    add("--negative", metavar="TEXT", help="what not to show")
    add("--size", metavar="WxH", type=_size, help="pixels, such as 512x2048 (default: the model's)")
    add("--count", metavar="N", type=int, default=1, help="how many, each with a seed of its own")
    add("--views", metavar="N", type=int, help="cameras around an object")
    add("--frames", metavar="N", type=int, help="frames of a video")
    add("--image", metavar="FILE", type=Path, help="a reference, a first frame or a folder of frames, 8 bits")
    add("--mesh", metavar="FILE", type=Path, help="a mesh to look at or to paint")
    add("--steps", metavar="N", type=int, help="of the sampler (default: as published)")
    add("--guidance", metavar="G", type=float, help="strength of the prompt (default: as published)")
    add("--seed", metavar="N", type=int, default=0, help="of everything random (default: 0)")
    add("--adapter", metavar="FILE", type=Path, help="an adapter file, or the folder of a released one")
    add("--tiny", action="store_true", help="the recipe's small trial settings")
    add("-o", "--output", metavar="OUT", type=Path, required=True, help="a folder for pictures, page and settings")
    add("--overwrite", action="store_true", help="replace such a folder")


def _size(text: str) -> tuple[int, int]:
    """ "WIDTHxHEIGHT" as (height, width)."""
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r}: wants WIDTHxHEIGHT in pixels, such as 512x2048")
    return int(height), int(width)


def generate(asked: argparse.Namespace) -> Path:
    """Make what the arguments ask for and write it; the folder is complete, or as it was. Returns its page.

    Raises RequestError where a number, a file or the output is wrong, before any weights are read, and where the task
    does not make what is wanted.
    """
    from shared.report import generated

    wanted = checked(asked)
    generated.check_output(asked.output, overwrite=asked.overwrite)
    made_by = _task(asked)
    with _progress() as told:
        made = made_by.task.generate(wanted, progress=told)
    settings = {**made_by.told, **_given(wanted), **made.settings}
    return generated.write(asked.output, made, settings, random=made_by.random)


def checked(asked: argparse.Namespace) -> Wanted:
    """What is wanted, from arguments whose numbers and files are sound."""
    from shared.generating import Wanted

    for name, most in MOST.items():
        value = getattr(asked, name)
        if value is not None and not 1 <= value <= most:
            raise RequestError(f"--{name} {value}: use 1 to {most:,}")
    if asked.guidance is not None and not (math.isfinite(asked.guidance) and asked.guidance >= 0):
        raise RequestError(f"--guidance {asked.guidance:g}: use a number from 0")
    if not 0 <= asked.seed < 2**32:
        raise RequestError(f"--seed {asked.seed}: use 0 to 2**32 - 1")
    if asked.size is not None:
        _check_size(*asked.size)
    if asked.image is not None:
        for path in _pictures(asked.image):
            _check_image(path)
    if asked.mesh is not None:
        _check_file("--mesh", asked.mesh)
    names = ("prompt", "negative", "size", "count", "views", "frames", "image", "mesh", "steps", "guidance", "seed")
    return Wanted(**{name: getattr(asked, name) for name in names})


def _check_size(height: int, width: int) -> None:
    asked = f"--size {width}x{height}"
    if not 0 < min(height, width) <= max(height, width) <= LARGEST:
        raise RequestError(f"{asked}: sides from {GRAIN} to {LARGEST:,} pixels")
    if height % GRAIN or width % GRAIN:
        near = "x".join(str(max(GRAIN, round(side / GRAIN) * GRAIN)) for side in (width, height))
        raise RequestError(f"{asked}: sides must be multiples of {GRAIN} pixels, such as {near}")


def _check_file(option: str, path: Path) -> None:
    from shared.store import check_readable

    try:
        check_readable(path)
    except RequestError as error:
        raise RequestError(f"{option} {error}") from error
    if not path.stat().st_size:
        raise RequestError(f"{option} {path}: empty")


def _pictures(path: Path) -> list[Path]:
    """The file, or the pictures in a folder of frames."""
    if not path.is_dir():
        return [path]
    found = sorted(each for each in path.iterdir() if each.suffix.lower() in PICTURES)
    if not found:
        raise RequestError(f"--image {path}: a folder without pictures ({', '.join(PICTURES)})")
    return found


def _check_image(path: Path) -> None:
    """8 bits a channel, grey or colour, with or without alpha; not wholly transparent."""
    from PIL import Image

    _check_file("--image", path)
    try:
        with Image.open(path) as file:
            file.load()
            mode, alpha = file.mode, file.convert("RGBA").getchannel("A").getextrema()[1]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"--image {path}: not a readable image ({' '.join(str(error).split())})") from error
    if mode not in EIGHT_BITS:
        raise RequestError(f"--image {path}: pixels of mode {mode}; wants 8 bits a channel, grey or RGB, alpha or not")
    if not alpha:
        raise RequestError(f"--image {path}: wholly transparent")


class _MadeBy(NamedTuple):
    """A task ready to generate, what tells it from others, and whether its weights were never trained."""

    task: Any
    told: dict[str, Any]
    random: bool


def _task(asked: argparse.Namespace) -> _MadeBy:
    """The task of a finished run or a recipe, with the adapter that is asked for."""
    from shared import run

    if asked.adapter is not None and not asked.adapter.exists():
        raise RequestError(f"--adapter {asked.adapter}: no such file or folder")
    if _is_run(asked.target):
        if asked.overrides or asked.tiny:
            raise RequestError(f"{asked.target} is a finished run: its recipe cannot be changed by key=value or --tiny")
        trained = run.load(asked.target)
        task, digest = trained.task, trained.identity["adapter"]
    else:
        task, digest = _from_recipe(asked), None
    whole = _is_run(asked.target) and any(method.trains_backbone for method in task.model.methods.values())
    if asked.adapter is not None:
        task.load_adapter(asked.adapter)
        digest = _digest(asked.adapter)
    task = task.to(run.device()).eval()
    facts = run.weights(task.model)
    told = {"made by": asked.target, "overrides": " ".join(asked.overrides), "tiny": asked.tiny or None}
    told |= {"backbone": facts["backbone"] + (", then trained whole" if whole else "")}
    told |= {"adapter": digest or "none: the frozen model"}
    told |= {"adapter file": None if asked.adapter is None else str(asked.adapter)}
    return _MadeBy(task, {name: value for name, value in told.items() if value}, facts["random_backbone"] and not whole)


def _is_run(target: str) -> bool:
    return target.startswith("hf://") or Path(target).is_dir()


def _from_recipe(asked: argparse.Namespace) -> Any:
    """The recipe's task; of the data only the settings are read, no file."""
    from shared import recipe, run

    chosen = recipe.load(asked.target, asked.overrides, tiny=asked.tiny, files=False)
    from shared.training.task import Task

    task = chosen.sections["task"].entry
    if task.load().generate is Task.generate:
        raise RequestError(f"{asked.target}: its task, {task.name}, does not generate")
    return run.task_of(chosen, chosen.outline())


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files in order."""
    import hashlib

    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _given(wanted: Wanted) -> dict[str, Any]:
    """What the user gave, as plain values."""
    from dataclasses import asdict

    plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(wanted).items()}
    plain.pop("size")
    return {name: value for name, value in plain.items() if value not in (None, "")}


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, silent elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("generating", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
