"""The page and the table of a comparison: score, size and cost of each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.recipe import Recipe
from shared.report import efficiency, page, plots
from shared.report.run_page import grouped, random_note, size, spelled
from shared.report.terminal import print_table
from shared.training.engine import smaller_is_better

if TYPE_CHECKING:
    from shared.compare import Row

_MEASURED = "Step: the median. Peak memory: of the whole process, or of the GPU's tensors where a GPU trains."
Found = Mapping[str, Sequence[Mapping[str, Any]]]


def print_comparison(recipe: Recipe, rows: Sequence[Row], found: Found) -> None:
    first = next(iter(found.values()))[0]
    print_table(*_scores(rows, first), title=f"{recipe.name}: test split, {first['backbone']}")
    print_table(*_costs(rows))
    print_table(*efficiency.latencies(rows), title="Inference, as a share of the bare model's time")
    for verdict in _verdicts(rows, first):
        print(verdict)
    if first["random_backbone"]:
        print(
            "The backbone's weights are random, not pretrained: this compares methods, it measures no foundation model."
        )


def write_compare_page(folder: Path, recipe: Recipe, rows: Sequence[Row], found: Found, places: Sequence[str]) -> Path:
    """Write ``report.html``, with links to the runs at ``places`` below ``folder``, and return its path."""
    first = next(iter(found.values()))[0]
    score = score_of(first)
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
        page.section("Test split", page.table(*_scores(rows, first))),
        page.section("Size and cost", page.table(*_costs(rows)), page.lead(_MEASURED)),
        page.section(
            "Inference",
            page.table(*efficiency.latencies(rows)),
            page.lead(f"As a share of the bare model's time. {efficiency.NOTE}"),
        ),
        *(
            [page.section("Against full fine-tuning", *map(page.lead, said))]
            if (said := _verdicts(rows, first))
            else []
        ),
        page.section("Score against size", page.figures({f"{spelled(score)} of the test split": chart})),
        page.section("Runs", page.links(runs)),
        page.section("Recipe", page.code(recipe.text())),
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


def _scores(rows: Sequence[Row], first: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    score = score_of(first)
    classes = [
        f"{group}/{name}" for group, names in grouped(first["test"]).items() if group != "support" for name in names
    ]
    names = [score, *(n for n in rows[0].scores if "/" not in n and n not in (score, "loss")), *classes]
    heads = ["method", *(spelled(name) for name in names)]
    return heads, [[row.method, *(_score(row, name) for name in names)] for row in rows]


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
