"""The page and the table of a comparison: score, size and cost of each method."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.recipe import Recipe
from shared.report import efficiency, page, plots
from shared.report.run_page import COST, grouped, milliseconds, random_note, seconds, size, spelled
from shared.report.terminal import print_table
from shared.training.engine import smaller_is_better

if TYPE_CHECKING:
    from shared.compare import Row

_MEASURED = "Step: the median. Peak memory: of the whole process, or of the GPU's tensors where a GPU trains."
Found = Mapping[str, Sequence[Mapping[str, Any]]]


def print_comparison(recipe: Recipe, rows: Sequence[Row], found: Found) -> None:
    first = next(iter(found.values()))[0]
    print_table(*_summary(rows, first), title=f"{recipe.name}: test split, {first['backbone']}")
    for verdict in _verdicts(rows, first):
        print(verdict)
    print_table(*_scores(rows, first))
    print_table(*efficiency.latencies(rows), title="Inference, as a share of the bare model's time")
    if plans := _plans(found):
        print_table(*plans, title="cost: predicted / measured")
    if first["random_backbone"]:
        print(
            "The backbone's weights are random, not pretrained: this compares methods, it measures no foundation model."
        )


def write_compare_page(folder: Path, recipe: Recipe, rows: Sequence[Row], found: Found, places: Sequence[str]) -> Path:
    """Write ``report.html``, with links to the runs at ``places`` below ``folder``, and return its path."""
    first = next(iter(found.values()))[0]
    score, plans = score_of(first), _plans(found)
    bars = "; bars: standard deviation over seeds" if rows[0].seeds > 1 else ""
    values = [(row, row.scores[score]) for row in rows]
    points = {row.method: (row.trainable, value, row.spreads[score]) for row, value in values if value is not None}
    chart = plots.scatter(points, "trainable parameters", spelled(score))
    seeds, said = rows[0].seeds, _verdicts(rows, first)
    runs = {place.replace("/", ", ").replace("_", " "): f"{place}/report.html" for place in places}
    document = page.page(
        f"omniadapt: methods on {recipe.name}",
        page.lead(
            f"{first['backbone']}; {seeds} seed{'s' if seeds > 1 else ''}"
            + (", mean ± standard deviation" if seeds > 1 else "")
        ),
        random_note(first),
        page.section("Score and cost", page.table(*_summary(rows, first)), page.lead(_MEASURED)),
        page.section("Against full fine-tuning", *map(page.lead, said)) if said else "",
        page.section("Score against size", page.figures({f"{spelled(score)} of the test split{bars}": chart})),
        page.section("All scores of the test split", *_in_parts(*_scores(rows, first))),
        page.section(
            "Inference",
            page.table(*efficiency.latencies(rows)),
            page.lead(f"As a share of the bare model's time. {efficiency.NOTE}"),
        ),
        page.section("Cost, predicted / measured", page.table(*plans), page.lead(COST)) if plans else "",
        page.section("Runs", page.links(runs)),
        page.section("Recipe", page.code(recipe.text(variants=True))),
        page.section("Versions", page.table(("", ""), first["versions"].items(), numbers=2)),
    )
    path = folder / "report.html"
    page.write(path, document)
    return path


def _verdicts(rows: Sequence[Row], first: Mapping[str, Any]) -> list[str]:
    return efficiency.verdicts(rows, score_of(first), smaller=smaller_is_better(first["best"]["monitor"]))


def score_of(found: Mapping[str, Any]) -> str:
    """The test result that methods are ranked by: the one that picked the checkpoints."""
    return found["best"]["monitor"].partition("/")[2]


def _summary(rows: Sequence[Row], first: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The score that counts, and the costs, of each method."""
    score, (heads, costs) = score_of(first), _costs(rows)
    beside = [[cost[0], _score(row, score), *cost[1:]] for row, cost in zip(rows, costs, strict=True)]
    return [heads[0], spelled(score), *heads[1:]], beside


def _scores(rows: Sequence[Row], first: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Every score, with a column for each method."""
    score = score_of(first)
    classes = [
        f"{group}/{name}" for group, names in grouped(first["test"]).items() if group != "support" for name in names
    ]
    names = [score, *(n for n in rows[0].scores if "/" not in n and n != score), *classes]
    return ["", *(row.method for row in rows)], [
        [spelled(name), *(_score(row, name) for row in rows)] for name in names
    ]


def _in_parts(heads: Sequence[str], rows: Sequence[Sequence[str]], most: int = 6) -> list[str]:
    """A table as several alike, each with at most ``most`` columns of numbers, which paper is wide enough for."""
    count = len(heads) - 1
    each = math.ceil(count / math.ceil(count / most))
    starts = range(1, len(heads), each)
    return [page.table([heads[0], *heads[s : s + each]], [[r[0], *r[s : s + each]] for r in rows]) for s in starts]


def _plans(found: Found) -> tuple[list[str], list[list[str]]] | None:
    """Predicted and measured costs of each method, means over its runs; None where nothing was predicted."""
    units = {
        "step": ("step_seconds", milliseconds),
        "training": ("train_seconds", seconds),
        "peak memory": ("peak_memory_bytes", size),
    }
    rows = []
    for method, results in found.items():
        known = [result for result in results if result.get("predicted")]
        cells = [method]
        for key, write in units.values():
            means = [write(statistics.fmean(r[of][key] for r in known)) for of in ("predicted", "cost") if known]
            cells.append(" / ".join(means) or "–")
        rows.append(cells)
    return (["method", *units], rows) if any(cells[1] != "–" for cells in rows) else None


def _costs(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    heads = ["method", "trainable", "training", "step", "peak memory", "file"]
    times = [(f"{row.train_seconds:.0f} s", f"{1000 * row.step_seconds:.0f} ms") for row in rows]
    sizes = [(size(row.peak_bytes), size(row.file_bytes)) for row in rows]
    return heads, [[row.method, f"{row.trainable:,}", *t, *s] for row, t, s in zip(rows, times, sizes, strict=True)]


def _score(row: Row, name: str) -> str:
    value = row.scores.get(name)
    if value is None:
        return "–"
    return f"{value:.3f}" + (f" ± {row.spreads[name]:.3f}" if row.seeds > 1 else "")
