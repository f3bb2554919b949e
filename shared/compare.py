"""Comparisons: one recipe trained with several methods, seeds and folds, as a table and a page."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from shared import catalog
from shared.claim import claimed
from shared.errors import RequestError, WorkError
from shared.recipe import Recipe, merge
from shared.store import write_atomically

LATENCY = "latency.json"


class Row(NamedTuple):
    """One method over its seeds: mean and spread (sample standard deviation, 0 for one seed) of what was measured.

    scores: test results by name, None where no seed defines one; with folds, a seed's are those of all its test splits
    together.  spreads: of the same.  train_seconds: of one training.  latency: seconds of inference by form ("bare",
    "separate", "folded", "merged"), of ``"one"`` sample and of a ``"batch"``, of the first run.  The rest are means.
    """

    method: str
    seeds: int
    scores: dict[str, float | None]
    spreads: dict[str, float]
    trainable: int
    train_seconds: float
    step_seconds: float
    peak_bytes: float
    file_bytes: float
    latency: dict[str, dict[str, float]]


class Planned(NamedTuple):
    """One training of a comparison: its method's name, its recipe, and its directory below that of the comparison."""

    method: str
    recipe: Recipe
    place: str


def compare(
    recipe: Recipe, methods: Sequence[str], seeds: Sequence[int], output: Path | None = None, *,
    folds: int | None = None, resume: bool = False,
) -> list[Row]:  # fmt: skip
    """Train ``recipe`` with each method and seed on the same data, print the table and write ``report.html``.

    Data that the run's seed draws are the same for every method, and others for another seed.

    methods: names of the recipe's ``compare`` section, of classes, or their slugs; a method other than the recipe's own
    runs with its defaults. None: the whole section. "all": every method that needs no setting and fits; what does not
    fit is told. Runs go to ``<output>/<method>/seed_<n>``. Everything is checked before the first run starts.
    folds: cross-validation: each method and seed trains ``folds`` times, with ``data.fold`` 0, 1 ... of
    ``data.folds``, in ``seed_<n>/fold_<k>``, and is scored on all these test splits together (``Task.pooled``).
    resume: keep the finished runs that are in ``output`` already.
    """
    from shared.report.compare_page import print_comparison, score_of, write_compare_page
    from shared.report.run_page import number, spelled
    from shared.run import RECIPE, directory

    planned = _plan(recipe, methods, seeds or [recipe.seed], folds)
    begun = output if resume and output and any((output / one.place / RECIPE).is_file() for one in planned) else None
    named = output or Path("runs") / recipe.name / f"compare_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    output = begun or directory(recipe, named)
    data = _data(planned)
    planned, data = _fitting(planned, data, skip=list(methods) == ["all"])
    with claimed(output, fresh=begun is None):
        runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
        latencies: dict[str, dict[str, dict[str, float]]] = {}
        for index, one in enumerate(planned):
            print(f"{one.place.replace('/', ', ').replace('_', ' ')} ({index + 1} of {len(planned)})", flush=True)
            result = _run(one, output, data[index])
            if all(method != one.method for method, _ in runs):
                latencies[one.method] = _latency(one, output, data[index])
            runs.setdefault((one.method, one.recipe.seed), []).append(result)
            score, seconds = score_of(result), result["cost"]["train_seconds"]
            print(f"  {spelled(score)} {number(result['test'][score])} after {seconds:.0f} s of training", flush=True)
        found: dict[str, list[dict[str, Any]]] = {}
        for (method, _), results in runs.items():
            found.setdefault(method, []).append(_together(recipe, results) if folds else results[0])
        rows = [_row(method, results, latencies[method]) for method, results in found.items()]
        write_atomically(output / "compare.json", json.dumps([row._asdict() for row in rows], indent=1).encode())
        page = write_compare_page(output, recipe, rows, found, [one.place for one in planned])
    print_comparison(recipe, rows, found)
    print(f"page: {page}")
    return rows


def _plan(recipe: Recipe, methods: Sequence[str], seeds: Sequence[int], folds: int | None) -> list[Planned]:
    """Every training, in the order asked for: methods, in each the seeds, in each the folds."""
    ways = _ways(recipe, methods)
    for value, times in Counter([*(label for label, _ in ways), *seeds]).items():
        if times > 1:
            raise RequestError(f"compare: {value} is named twice")
    if folds is None:
        splits: list[tuple[str, dict[str, Any]]] = [("", {})]
    elif folds < 2:
        raise RequestError(f"compare: {folds} folds: use 2 or more")
    else:
        splits = [(f"/fold_{k}", {"data": {"fold": k, "folds": folds}}) for k in range(folds)]
    return [
        Planned(name, recipe.replaced(**merge(merge(over, {"seed": seed}), change)), f"{name}/seed_{seed}{below}")
        for name, over in ways for seed in seeds for below, change in splits
    ]  # fmt: skip


def _ways(recipe: Recipe, methods: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """What is compared: names, and what each changes of the recipe."""
    if list(methods) == ["all"]:
        methods = [entry.name for entry in catalog.entries("method") if not any(a.required for a in entry.arguments)]
    if not (names := methods or list(recipe.variants)):
        raise RequestError("compare: name at least one method, such as --methods probe,lora")
    found: list[tuple[str, dict[str, Any]]] = []
    for name in names:
        if name in recipe.variants:
            found.append((name, recipe.variants[name]))
        else:
            kind = catalog.find(name, "method").name
            found.append((kind, {"method": {"type": kind}}))
    return found


def _run(one: Planned, output: Path, data: Any) -> dict[str, Any]:
    """Train and test, or read what a finished run of the same recipe found."""
    from shared.plan import forget_peak
    from shared.run import METRICS, RECIPE, check_same, run

    folder = output / one.place
    if begun := (folder / RECIPE).is_file():
        check_same(one.recipe, folder / RECIPE)
    if (folder / METRICS).is_file():
        return json.loads((folder / METRICS).read_text())
    forget_peak()
    return run(one.recipe, folder, resume=begun, data=data)


def _together(recipe: Recipe, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The runs of all folds as one result: test splits pooled by the task, costs averaged."""
    task = recipe.sections["task"].entry.load()
    costs = [result["cost"] for result in results]
    cost = {key: statistics.fmean(c[key] for c in costs) for key in costs[0]}
    return {
        **results[0],
        "test": task.pooled([result["test"] for result in results]),
        "cost": cost,
        "file_bytes": statistics.fmean(result["file_bytes"] for result in results),
    }


def _data(planned: Sequence[Planned]) -> list[Any]:
    """The data of each training, in its order: one object for all that describe the same."""
    built: dict[str, Any] = {}
    for one in planned:
        key = repr(one.recipe.sections["data"])
        if key not in built:
            built[key] = one.recipe.build("data")
    return [built[repr(one.recipe.sections["data"])] for one in planned]


def _fitting(planned: Sequence[Planned], data: list[Any], *, skip: bool) -> tuple[list[Planned], list[Any]]:
    """Build every method on the meta device: what does not fit the backbone is told before any has trained.

    skip: leave it out with a line that says why; else it is an error.
    """
    import torch

    from shared.run import build

    unfit = set()
    for one in {one.method: one for one in planned}.values():
        try:
            with torch.device("meta"):
                build(one.recipe, data[0])
        except (RequestError, WorkError) as error:
            if not skip:
                raise
            unfit.add(one.method)
            print(f"{one.method} does not fit: {error}", flush=True)
    kept = [(one, own) for one, own in zip(planned, data, strict=True) if one.method not in unfit]
    return [one for one, _ in kept], [own for _, own in kept]


def _latency(one: Planned, output: Path, data: Any) -> dict[str, dict[str, float]]:
    """Seconds of inference of a finished run by form, of one sample and of a batch; kept in its method's directory."""
    from shared.latency import first, latency
    from shared.run import ADAPTER, device, task_of

    file = output / one.method / LATENCY
    if file.is_file():
        return json.loads(file.read_text())
    task = task_of(one.recipe, data)
    task.model.load(output / one.place / ADAPTER)
    task.to(device())
    batch = next(iter(data.test()))
    batch = {key: value.to(task.device) if hasattr(value, "to") else value for key, value in batch.items()}
    found = {"one": latency(task, first(batch), rounds=8), "batch": latency(task, batch, rounds=4)}
    write_atomically(file, json.dumps(found, indent=1).encode())
    return found


def _row(method: str, results: Sequence[Mapping[str, Any]], latency: dict[str, dict[str, float]]) -> Row:
    names = [n for n, v in results[0]["test"].items() if v is None or isinstance(v, (int, float))]
    known = {n: [r["test"][n] for r in results if r["test"].get(n) is not None] for n in names}
    costs = [result["cost"] for result in results]
    return Row(
        method=method,
        seeds=len(results),
        scores={n: statistics.fmean(v) if v else None for n, v in known.items()},
        spreads={n: statistics.stdev(v) if len(v) > 1 else 0.0 for n, v in known.items()},
        trainable=results[0]["parameters"]["trainable"],
        train_seconds=statistics.fmean(c["train_seconds"] for c in costs),
        step_seconds=statistics.fmean(c["step_seconds"] for c in costs),
        peak_bytes=statistics.fmean(c["peak_memory_bytes"] for c in costs),
        file_bytes=statistics.fmean(r["file_bytes"] for r in results),
        latency=latency,
    )
