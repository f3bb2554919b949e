"""Runs: the one flat function behind every recipe, and the directory it fills."""

from __future__ import annotations

import json
import logging
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from shared.claim import claimed, is_empty
from shared.errors import RequestError
from shared.logfile import logged
from shared.recipe import Recipe
from shared.store import write_atomically
from shared.training import processes

if TYPE_CHECKING:
    from shared.adapted import Adapted

RECIPE, ADAPTER, METRICS, CURVES, LOG, PAGE = (
    "recipe.yaml", "adapter.safetensors", "metrics.json", "metrics.csv", "log.txt", "report.html",
)  # fmt: skip
_SAME = (  # settings of the trainer that make no other result
    "device", "devices", "nodes", "strategy", "save_every", "recompute", "offload", "cache.folder", "cache.gigabytes",
)  # fmt: skip
_log = logging.getLogger("omniadapt")


def run(recipe: Recipe, output: Path, *, resume: bool = False, data: Any = None) -> dict[str, Any]:
    """Train what the recipe describes, test it, and fill the run directory.

    data: the recipe's data where they are built already. A recipe for several processes starts them, unless torchrun
    did; each builds everything, and the first writes.

    Returns what ``metrics.json`` holds: ``test`` results, ``parameters`` by role, ``cost`` and what was ``predicted``
    of it (or None), ``steps``, ``epochs``, ``best`` (which state was tested), and facts of the run. Raises RequestError
    and WorkError as the parts do.
    """
    from shared.plan import predict
    from shared.training.caching import cacheable
    from shared.training.engine import available, fit

    engine = recipe.build("trainer")
    if engine.processes > 1 and not processes.launched():
        if engine.nodes > 1:
            raise RequestError(f"trainer.nodes {engine.nodes}: start omniadapt on every node through torchrun (README)")
        return processes.launch(engine.devices, partial(run, recipe, output, resume=resume))
    available(engine)
    # Everything is built and all data read once before the directory exists: a wrong request leaves nothing behind.
    data = recipe.build("data") if data is None else data
    task = task_of(recipe, data)
    cacheable(task, engine)
    described, parameters = data.describe(), task.model.count()
    for split in (data.train, data.validation, data.test):
        split()  # a split that cannot be had is refused now
    first = processes.rank() == 0
    with _writing(recipe, output, fresh=not resume) if first else nullcontext():
        _log.info("recipe %s (%s), seed %d%s", recipe.name, recipe.source, recipe.seed, ", resumed" if resume else "")
        _log.info("data %s", json.dumps(described))
        _log.info("parameters %s", json.dumps(parameters))
        predicted = predict(task, data, engine, output) if engine.processes == 1 else None
        seed(recipe.seed)
        results = fit(task, data, engine, output, resume=resume)
        _log.info("test %s", json.dumps(results["test"]))
        facts = {"seed": recipe.seed, "parameters": parameters, "data": described, "versions": versions()}
        found = {**results, "predicted": predicted, **facts}
        return _written(recipe, output, found, task, data) if first else found


def _written(recipe: Recipe, output: Path, found: dict[str, Any], task: Any, data: Any) -> dict[str, Any]:
    """What a run found, completed, after the adapter file, the metrics and the page are written."""
    from shared.report.run_page import write_run_page
    from shared.training.engine import BEST, read_checkpoint

    if recipe.build("trainer").strategy == "fsdp":  # the trained model is divided: a whole one takes its place
        task = task_of(recipe, data)
        task.load_state_dict(read_checkpoint(output / BEST)["state_dict"])
    model: Adapted = task.model
    model.save(output / ADAPTER, metrics=scalars(found["test"]), extra={"recipe": recipe.tree, "data": found["data"]})
    found = found | weights(model) | {"file_bytes": (output / ADAPTER).stat().st_size}
    write_atomically(output / METRICS, json.dumps(found, indent=1).encode())
    write_run_page(output, recipe, found, task.pictures(data))
    _log.info("done: %s", output / PAGE)
    return found


def task_of(recipe: Recipe, data: Any) -> Any:
    """The recipe's task with a new model for this data."""
    return recipe.build("task", model=build(recipe, data), data=data, optimiser=recipe.build("optimiser"))


@contextmanager
def _writing(recipe: Recipe, output: Path, *, fresh: bool) -> Iterator[None]:
    """The run directory, for this process alone, with the recipe in it and the log open."""
    with claimed(output, fresh=fresh), logged(output / LOG):
        write_atomically(output / RECIPE, recipe.text().encode())
        yield


class Trained(NamedTuple):
    """A finished run, ready to predict. task: with the trained model, in eval mode, on the GPU where there is one.
    described: what its data said of themselves.  identity: facts that tell the model from any other."""

    task: Any
    described: dict[str, Any]
    identity: dict[str, Any]


def load(folder: str | Path) -> Trained:
    """The trained model of a run directory or ``hf://owner/name[@revision]``, from its recipe and adapter file alone.

    Raises RequestError where it is no directory of a finished run, or where the frozen weights are not those it was
    trained on.
    """
    import hashlib

    from shared import recipe as recipes
    from shared.hub import local
    from shared.store import read_header

    folder = local(folder)
    for name, what in ((RECIPE, "it is no run directory"), (ADAPTER, "the run has not finished")):
        try:
            there = (folder / name).is_file()
        except OSError as error:
            raise RequestError(f"{folder / name}: cannot be read: {error.strerror}") from error
        if not there:
            raise RequestError(f"{folder}: {what}: it holds no {name}")
    described = read_header(folder / ADAPTER)["extra"].get("data")
    if not isinstance(described, dict):
        raise RequestError(f"{folder / ADAPTER}: it does not say what data it was trained on")
    chosen = recipes.load(str(folder / RECIPE), files=False)
    data = SimpleNamespace(**described)
    if "band_names" in described:  # images
        data.bands = len(described["band_names"])
    elif "bands" not in described:
        data.bands = chosen.outline().bands
    model = build(chosen, data)
    model.load(folder / ADAPTER)
    task = chosen.build("task", model=model, data=data, optimiser=chosen.build("optimiser")).eval()
    digest = hashlib.sha256((folder / ADAPTER).read_bytes()).hexdigest()
    return Trained(task.to(device()), described, {"adapter": digest, "device": device()})


def device() -> str:
    """Where a trained model runs: on the GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def build(recipe: Recipe, data: Any) -> Adapted:
    """The adapted model of a recipe for data with these bands and classes, as far as they have them; the same seed
    gives the same weights."""
    from shared.adapted import adapt

    seed(recipe.seed)
    backbone = recipe.build("backbone", bands=getattr(data, "bands", None))
    seed(recipe.seed)
    classes = getattr(data, "classes", None)
    tasks = {task: len(names) for task, names in classes.items()} if isinstance(classes, Mapping) else None
    channels = getattr(backbone, "channels", None)
    summary_width = getattr(backbone, "summary_width", channels and channels[-1])
    count = None if tasks else classes and len(classes)
    head = recipe.build("head", channels=channels, summary_width=summary_width, classes=count, tasks=tasks)
    seed(recipe.seed)
    method = recipe.build("method")
    try:
        model = adapt(backbone, method, head=head)
    except RequestError as error:
        raise RequestError(f"{recipe.source}: method {type(method).__name__}: {error}") from error
    try:
        recipe.build("trainer").economise(model)
    except RequestError as error:
        raise RequestError(f"{recipe.source}: trainer: {error}") from error
    return model


def count(recipe: Recipe) -> dict[str, int]:
    """Numbers of parameters (``Adapted.count``) on the meta device: no weights are loaded and no data read."""
    import torch

    with torch.device("meta"):
        return build(recipe, recipe.outline()).count()


def seed(number: int) -> None:
    """Seed every random source a run draws from."""
    import random

    import numpy as np
    import torch

    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def weights(model: Adapted) -> dict[str, Any]:
    """The backbone with the source of its weights, and whether they were never trained."""
    source = getattr(model.backbone, "source", "as built")
    return {"backbone": f"{model.backbone_name}, weights: {source}", "random_backbone": source.startswith("random")}


def scalars(results: dict[str, Any]) -> dict[str, float]:
    """The plain numbers among a task's results."""
    return {name: value for name, value in results.items() if isinstance(value, (int, float))}


def directory(recipe: Recipe, output: Path | None, *, resume: bool = False) -> Path:
    """Where a run writes: ``output``, or ``runs/<recipe>/<time>``; to resume, the recipe's last run.

    Raises RequestError where there is something else already, or nothing to resume, or a run of another recipe.
    Processes that torchrun started must be told one directory, which the first of them checks.
    """
    if processes.launched():
        if output is None:
            raise RequestError("started by torchrun: give --output DIR, the same for all processes")
        if processes.rank() > 0:
            return output
    runs = Path("runs") / recipe.name
    if resume:
        if output is None:
            output = max((p for p in runs.glob("*") if (p / RECIPE).is_file()), default=None)
        if output is None or not (output / RECIPE).is_file():
            raise RequestError(f"nothing to resume: {output or runs} holds no run")
        check_same(recipe, output / RECIPE)
        return output
    if output is None:
        return _unused(runs, datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    if output.exists() and (not output.is_dir() or not is_empty(output)):
        hint = "; add --resume to go on with this run" if (output / RECIPE).is_file() else ""
        raise RequestError(f"{output} is not an empty directory{hint}")
    return output


def _unused(runs: Path, name: str) -> Path:
    path, number = runs / name, 2
    while path.exists():
        path, number = runs / f"{name}_{number}", number + 1
    return path


def check_same(recipe: Recipe, path: Path) -> None:
    """Raises RequestError where the resolved recipe at ``path`` is another one, with the first key that differs."""
    from shared.recipe import read

    before, now = _flat(read(path)), _flat(recipe.tree)
    where = {f"trainer.{name}" for name in _SAME}
    for key in sorted((before.keys() | now.keys()) - where):
        if before.get(key) != now.get(key):
            was, is_now = before.get(key, "not set"), now.get(key, "not set")
            raise RequestError(f"{path.parent} cannot go on with another recipe: {key} was {was}, now {is_now}")


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{path}.{key}".lstrip(".")).items()}


def versions() -> dict[str, str]:
    """What a run ran on: our version, Python, the platform, and the libraries in use."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "platform": platform.platform()}
    libraries = ("torch", "lightning", "torchmetrics", "timm", "open_clip_torch", "transformers", "torchgeo")
    for name in ("omniadapt", *(n for n in libraries if n.partition("_torch")[0] in sys.modules)):
        try:
            found[name.replace("_", "-")] = version(name)
        except PackageNotFoundError:
            found[name.replace("_", "-")] = "not installed as a package"
    return found
