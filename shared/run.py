"""Runs: the one flat function behind every recipe, and the directory it fills."""

from __future__ import annotations

import json
import logging
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from shared.errors import RequestError, WorkError
from shared.recipe import Recipe
from shared.store import write_atomically

if TYPE_CHECKING:
    from shared.adapted import Adapted

RECIPE, ADAPTER, METRICS, CURVES, LOG, PAGE = (
    "recipe.yaml", "adapter.safetensors", "metrics.json", "metrics.csv", "log.txt", "report.html",
)  # fmt: skip
_log = logging.getLogger("omniadapt")


def run(recipe: Recipe, output: Path, *, resume: bool = False, data: Any = None) -> dict[str, Any]:
    """Train what the recipe describes, test it, and fill the run directory.

    data: the recipe's data where they are built already.

    Returns what ``metrics.json`` holds: ``test`` results, ``parameters`` by role, ``cost``, ``steps``, ``epochs``,
    ``best`` (which state was tested), and facts of the run. Raises RequestError and WorkError as the parts do.
    """
    from shared.report.run_page import write_run_page
    from shared.training.engine import fit

    # Everything is built and all data read once before the directory exists: a wrong request leaves nothing behind.
    data = recipe.build("data") if data is None else data
    model, engine = build(recipe, data), recipe.build("trainer")
    task = recipe.build("task", model=model, data=data, optimiser=recipe.build("optimiser"))
    described, parameters = data.describe(), model.count()

    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / RECIPE, recipe.text().encode())
    with _logged(output / LOG):
        _log.info("recipe %s (%s), seed %d%s", recipe.name, recipe.source, recipe.seed, ", resumed" if resume else "")
        _log.info("data %s", json.dumps(described))
        _log.info("parameters %s", json.dumps(parameters))
        seed(recipe.seed)
        results = fit(task, data, engine, output, resume=resume)
        _log.info("test %s", json.dumps(results["test"]))

        extra = {"recipe": recipe.tree, "data": described}
        model.save(output / ADAPTER, metrics=scalars(results["test"]), extra=extra)
        found = {**results, "seed": recipe.seed, "parameters": parameters, "data": described, "versions": versions()}
        found |= weights(model) | {"file_bytes": (output / ADAPTER).stat().st_size}
        write_atomically(output / METRICS, json.dumps(found, indent=1).encode())
        write_run_page(output, recipe, found, task.pictures(data))
        _log.info("done: %s", output / PAGE)
    return found


class Trained(NamedTuple):
    """A finished run, ready to predict. task: with the trained model, in eval mode, on the GPU where there is one.
    described: what its data said of themselves.  identity: facts that tell the model from any other."""

    task: Any
    described: dict[str, Any]
    identity: dict[str, Any]


def load(folder: Path) -> Trained:
    """The trained model of a run directory, from its recipe and adapter file; the training data need not be there.

    Raises RequestError where it is no directory of a finished run, or where the frozen weights are not those it was
    trained on.
    """
    import hashlib

    import torch

    from shared import recipe as recipes
    from shared.store import read_header

    for name, what in ((RECIPE, "it is no run directory"), (ADAPTER, "the run has not finished")):
        if not (folder / name).is_file():
            raise RequestError(f"{folder}: {what}: it holds no {name}")
    described = read_header(folder / ADAPTER)["extra"].get("data")
    if not isinstance(described, dict):
        raise RequestError(f"{folder / ADAPTER}: it does not say what data it was trained on")
    chosen = recipes.load(str(folder / RECIPE), files=False)
    data = SimpleNamespace(**described)
    if "band_names" in described:  # images
        data.bands = len(described["band_names"])
    model = build(chosen, data)
    model.load(folder / ADAPTER)
    task = chosen.build("task", model=model, data=data, optimiser=chosen.build("optimiser")).eval()
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    digest = hashlib.sha256((folder / ADAPTER).read_bytes()).hexdigest()
    return Trained(task.to(device), described, {"adapter": digest, "device": device})


def build(recipe: Recipe, data: Any) -> Adapted:
    """The adapted model of a recipe for data with these bands and classes, as far as they have them; the same seed
    gives the same weights."""
    from shared.adapted import adapt

    seed(recipe.seed)
    backbone = recipe.build("backbone", bands=getattr(data, "bands", None))
    seed(recipe.seed)
    classes = getattr(data, "classes", None)
    head = recipe.build("head", channels=getattr(backbone, "channels", None), classes=classes and len(classes))
    seed(recipe.seed)
    method = recipe.build("method")
    try:
        return adapt(backbone, method, head=head)
    except RequestError as error:
        raise RequestError(f"{recipe.source}: method {type(method).__name__}: {error}") from error


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
    """
    runs = Path("runs") / recipe.name
    if resume:
        if output is None:
            output = max((p for p in runs.glob("*") if (p / RECIPE).is_file()), default=None)
        if output is None or not (output / RECIPE).is_file():
            raise RequestError(f"nothing to resume: {output or runs} holds no run")
        _same(recipe, output / RECIPE)
        return output
    if output is None:
        return _unused(runs, datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        hint = "; add --resume to go on with this run" if (output / RECIPE).is_file() else ""
        raise RequestError(f"{output} is not an empty directory{hint}")
    return output


def _unused(runs: Path, name: str) -> Path:
    path, number = runs / name, 2
    while path.exists():
        path, number = runs / f"{name}_{number}", number + 1
    return path


def _same(recipe: Recipe, path: Path) -> None:
    from shared.recipe import read

    before, now = _flat(read(path)), _flat(recipe.tree)
    for key in sorted(before.keys() | now.keys()):
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
    for name in ("omniadapt", "torch", "lightning", "torchmetrics", "timm", "open_clip_torch", "transformers"):
        if name.partition("_torch")[0] in sys.modules or name == "omniadapt":
            try:
                found[name.replace("_", "-")] = version(name)
            except PackageNotFoundError:
                found[name.replace("_", "-")] = "not installed as a package"
    return found


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Within it, our and Lightning's messages and all warnings also go to ``path``, and so does a failure."""
    file, terminal = logging.FileHandler(path, encoding="utf-8"), logging.StreamHandler()
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    warned = logging.getLogger("py.warnings")
    pairs = [(_log, file), (logging.getLogger("lightning.pytorch"), file), (warned, file), (warned, terminal)]
    before = _log.level
    _log.setLevel(logging.INFO)
    for logger, handler in pairs:
        logger.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    except BaseException as error:
        known = isinstance(error, (RequestError, WorkError, KeyboardInterrupt, SystemExit))
        _log.error("stopped: %s: %s", type(error).__name__, error, exc_info=not known)
        raise
    finally:
        logging.captureWarnings(False)
        _log.setLevel(before)
        for logger, handler in pairs:
            logger.removeHandler(handler)
        file.close()
