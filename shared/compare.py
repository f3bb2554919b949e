"""Comparisons: one recipe trained with several methods and seeds, as a table and a page."""

from __future__ import annotations

import gc
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from shared import catalog
from shared.claim import claimed
from shared.errors import RequestError
from shared.recipe import Recipe
from shared.store import write_atomically


class Row(NamedTuple):
    """One method over its seeds: mean and spread (sample standard deviation, 0 for one seed) of what was measured.

    scores: test results by name, None where no seed defines one.  spreads: of the same.  The rest are means.
    """

    method: str
    seeds: int
    scores: dict[str, float | None]
    spreads: dict[str, float]
    trainable: int
    step_seconds: float
    peak_bytes: float
    file_bytes: float


def compare(recipe: Recipe, methods: Sequence[str], seeds: Sequence[int], output: Path | None = None) -> list[Row]:
    """Train ``recipe`` with each method and seed on the same data, print the table and write ``report.html``.

    Data that the run's seed draws are the same for every method, and others for another seed.

    methods: names of classes, or their slugs; a method other than the recipe's own runs with its defaults. Runs go to
    ``<output>/<method>/seed_<n>``. Everything is checked before the first run starts.
    """
    from shared.report.compare_page import print_comparison, score_of, write_compare_page
    from shared.report.run_page import number, spelled
    from shared.run import directory, run

    recipes = _recipes(recipe, methods, seeds or [recipe.seed])
    output = directory(recipe, output or Path("runs") / recipe.name / f"compare_{datetime.now():%Y-%m-%d_%H-%M-%S}")
    data = _data(recipes)
    _check_sites(recipes, data[recipes[0][1].seed])
    with claimed(output, fresh=True):
        found: dict[str, list[dict[str, Any]]] = {}
        for index, (method, one) in enumerate(recipes, 1):
            print(f"{method}, seed {one.seed} ({index} of {len(recipes)})", flush=True)
            _forget_peak()
            result = run(one, output / method / f"seed_{one.seed}", data=data[one.seed])
            found.setdefault(method, []).append(result)
            score, seconds = score_of(result), result["cost"]["train_seconds"]
            print(f"  {spelled(score)} {number(result['test'][score])} after {seconds:.0f} s of training", flush=True)
        rows = [_row(method, results) for method, results in found.items()]
        write_atomically(output / "compare.json", json.dumps([row._asdict() for row in rows], indent=1).encode())
        page = write_compare_page(output, recipe, rows, found)
    print_comparison(recipe, rows, found)
    print(f"page: {page}")
    return rows


def _recipes(recipe: Recipe, methods: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, Recipe]]:
    """(method's name, recipe) for each run, in the order asked for."""
    if not methods:
        raise RequestError("compare: name at least one method, such as --methods probe,lora")
    names = [catalog.find(name, "method").name for name in methods]
    for value, times in Counter([*names, *seeds]).items():
        if times > 1:
            raise RequestError(f"compare: {value} is named twice")
    return [(name, recipe.replaced(method={"type": name}, seed=seed)) for name in names for seed in seeds]


def _data(recipes: Sequence[tuple[str, Recipe]]) -> dict[int, Any]:
    """The data of each seed: one object for all where the seed draws nothing."""
    built: dict[str, Any] = {}
    found: dict[int, Any] = {}
    for _, one in recipes:
        key = repr(one.sections["data"].arguments)
        if key not in built:
            built[key] = one.build("data")
        found[one.seed] = built[key]
    return found


def _check_sites(recipes: Sequence[tuple[str, Recipe]], data: Any) -> None:
    """Build every method on the meta device: one that does not fit the backbone is told before any has trained."""
    import torch

    from shared.run import build

    for one in dict(recipes).values():
        with torch.device("meta"):
            build(one, data)


def _forget_peak() -> None:
    """Start the process's peak memory anew, where the system can (Linux), so that each run has its own."""
    gc.collect()
    if (file := Path("/proc/self/clear_refs")).exists():
        file.write_text("5")


def _row(method: str, results: Sequence[Mapping[str, Any]]) -> Row:
    names = [n for n, v in results[0]["test"].items() if v is None or isinstance(v, (int, float))]
    known = {n: [r["test"][n] for r in results if r["test"].get(n) is not None] for n in names}
    costs = [result["cost"] for result in results]
    return Row(
        method=method,
        seeds=len(results),
        scores={n: statistics.fmean(v) if v else None for n, v in known.items()},
        spreads={n: statistics.stdev(v) if len(v) > 1 else 0.0 for n, v in known.items()},
        trainable=results[0]["parameters"]["trainable"],
        step_seconds=statistics.fmean(c["step_seconds"] for c in costs),
        peak_bytes=statistics.fmean(c["peak_memory_bytes"] for c in costs),
        file_bytes=statistics.fmean(r["file_bytes"] for r in results),
    )
