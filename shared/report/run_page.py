"""The page of one run: its scores, curves, pictures, recipe and versions."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.recipe import Recipe
from shared.report import page, plots

_FIRST = ("loss", "miou", "iou", "accuracy", "macro_f1", "f1")  # charts in this order, others behind
_SPELLED = {"miou": "mIoU", "iou": "IoU", "oa": "overall accuracy", "f1": "F1", "macro_f1": "macro-F1"}

COST = (
    "Predicted before training, from a few batches. Step: one batch, the median. Waiting: for training batches, of the "
    "time of that and of steps. Training: with its checks. Peak "
    "memory: of the whole process, or of the GPU's tensors where a GPU trains."
)


def write_run_page(folder: Path, recipe: Recipe, found: Mapping[str, Any], pictures: plots.Pictures | None) -> None:
    """Write ``report.html``. found: what ``metrics.json`` holds."""
    parts = [
        page.lead(f"{recipe.sections['method'].entry.name} on {found['backbone']}; seed of the run {recipe.seed}"),
        random_note(found),
        page.section("Test split", page.table(("", ""), score_rows(found["test"])), page.lead(chosen(found))),
        *per_class(found["test"]),
        page.section("Training", *_training(folder / "metrics.csv")),
        _pictures(pictures),
        *_confusions(found),
        page.section("Size and cost", page.table(("", "predicted", "measured"), cost_rows(found)), page.lead(COST)),
        page.section("Data", page.code(_compact(found["data"]))),
        page.section("Recipe, as it ran", page.code(recipe.text())),
        page.section("Versions", page.table(("", ""), found["versions"].items(), numbers=2)),
    ]
    page.write(folder / "report.html", page.page(f"omniadapt: {recipe.name}", *parts))


def random_note(found: Mapping[str, Any]) -> str:
    """Says so where the backbone was never trained."""
    if not found["random_backbone"]:
        return ""
    return page.note(
        "The backbone's weights are random, not pretrained: these scores compare methods and show that the parts work "
        "together; they say nothing about a foundation model."
    )


def score_rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The plain numbers among a task's results; those of single classes are shown apart."""
    plain = {n: v for n, v in results.items() if "/" not in n and (v is None or isinstance(v, (int, float)))}
    return [(spelled(name), number(value)) for name, value in plain.items()]


def spelled(name: str) -> str:
    """A measure as readers write it: "iou/cloud" is "IoU cloud"."""
    return " ".join(_SPELLED.get(word, word.replace("_", " ")) for word in name.split("/"))


def chosen(found: Mapping[str, Any]) -> str:
    """Which state was tested."""
    best = found["best"]
    where, value = f"epoch {best['epoch']}, step {best['step']:,}", f"{spelled(best['monitor'])} {best['value']:.4f}"
    return f"Tested: the state after {where}, which was best with a {value}."


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def grouped(results: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Results called "group/name" by group: ``{"iou": {"cloud": 0.8}, "support": {...}}``."""
    groups: dict[str, dict[str, float | None]] = defaultdict(dict)
    for name, value in results.items():
        group, slash, member = name.partition("/")
        if slash:
            groups[group][member] = value
    return dict(groups)


def cost_rows(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What, as predicted (blank: it was not) and as measured."""
    parameters, cost, told = found["parameters"], found["cost"], found.get("predicted")
    share = parameters["trainable"] / max(parameters["trainable"] + parameters["frozen"], 1)
    rows = [
        ("trainable parameters", "trainable", "{:,}".format, parameters["trainable"]),
        ("time of a step", "step_seconds", milliseconds, cost["step_seconds"]),
        ("waiting for data", "wait_share", "{:.1%}".format, cost.get("wait_share")),
        ("time of training", "train_seconds", seconds, cost["train_seconds"]),
        ("peak memory", "peak_memory_bytes", size, cost["peak_memory_bytes"]),
    ]
    beside = [(name, _told(told, key, write), _told({key: value}, key, write)) for name, key, write, value in rows]
    return [
        *beside,
        ("share of all parameters", "", f"{share:.2%}"),
        ("trainable in the adapter", "", f"{parameters['adapter']:,}"),
        ("trainable in the head", "", f"{parameters['head']:,}"),
        ("frozen parameters", "", f"{parameters['frozen']:,}"),
        ("adapter file", "", size(found["file_bytes"])),
        ("training steps", "", f"{found['steps']:,} in {found['epochs']:,} epochs"),
    ]


def _told(found: Mapping[str, Any] | None, key: str, write: Any) -> str:
    return "–" if found is None or found.get(key) is None else write(found[key])


def milliseconds(value: float) -> str:
    return f"{1000 * value:,.1f} ms" if value < 0.1 else f"{1000 * value:,.0f} ms" if value < 10 else seconds(value)


def seconds(value: float) -> str:
    """A time in the units that read best."""
    if value < 100:
        return f"{value:.1f} s"
    minutes = round(value / 60)
    return f"{value / 60:.1f} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """Bytes in the unit that reads best."""
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def per_class(results: Mapping[str, Any]) -> list[str]:
    """A section for each group of shares (IoU), with the group ``support``, of ``unit``, told beside it; ``by`` says
    what the members are where they are no classes."""
    groups, by = grouped(results), results.get("by", "class")
    support, unit = groups.pop("support", {}), results.get("unit", "px")
    titled = {f"{spelled(group)} by {by}": values for group, values in groups.items()}
    return [page.section(title, page.bars(values, support, unit)) for title, values in titled.items()]


def _training(path: Path) -> Iterator[str]:
    """A chart for each quantity that was measured more than once, and a table of the others."""
    charts = _measured(path)
    lines = {name: each for name, each in charts.items() if any(len(xs) > 1 for xs, _ in each.values())}
    yield page.figures({spelled(name): plots.curves(each, "step") for name, each in lines.items()})
    once = [
        (f"{spelled(name)}{',' if line in ('train', 'validation') else ''} {line}".strip(), number(ys[0]), str(xs[0]))
        for name, each in charts.items() if name not in lines for line, (xs, ys) in each.items()
    ]  # fmt: skip
    if once:
        yield page.table(("measured once", "", "step"), once)


def _measured(path: Path) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """By quantity and line, steps and values: training and validation are lines of one quantity, and so are classes."""
    charts: dict[str, dict[str, tuple[list[int], list[float]]]] = defaultdict(dict)
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                split, *quantity = name.split("/") if "/" in name else ("", name)
                if text and split in ("train", "validation", "") and name not in ("step", "epoch"):
                    line = split if len(quantity) == 1 else quantity[1]
                    xs, ys = charts[quantity[0]].setdefault(line, ([], []))
                    xs.append(int(row["step"]))
                    ys.append(float(text))
    charts.pop("support", None)
    return {name: charts[name] for name in sorted(charts, key=lambda n: (*_FIRST, n).index(n))}


def _pictures(pictures: plots.Pictures | None) -> str:
    if pictures is None or not pictures.rows:
        return ""
    legends = [page.legend(colours, title) for title, colours in pictures.legends.items()]
    rows = [page.pictures(c, {label: plots.png(a) for label, a in images.items()}) for c, images in pictures.rows]
    return page.section("Pictures of the test split", *legends, page.gallery(rows))


def class_names(found: Mapping[str, Any]) -> list[str]:
    """Names of the rows of the confusion matrix; numbers where neither the data nor the results name as many."""
    count = len(found["test"]["confusion"])
    for names in (found["data"].get("classes"), grouped(found["test"]).get("support")):
        if names and len(names) == count:
            return [str(name) for name in names]
    return [str(number) for number in range(count)]


def confusions(matrix: Sequence[Sequence[int]], names: Sequence[str], most: int = 6) -> list[tuple[str, str, str]]:
    """The largest counts beside the diagonal: what for what, count, and share of the truth."""
    wrong = [(n, i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) if i != j and n]
    wrong.sort(key=lambda each: -each[0])
    return [(f"{names[i]} as {names[j]}", f"{n:,}", f"{n / sum(matrix[i]):.1%}") for n, i, j in wrong[:most]]


def matrices(found: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[Sequence[int]], list[str]]]:
    """Every confusion matrix of a run with the names of its rows: "" for the only one, else the task's name."""
    if matrix := found["test"].get("confusion"):
        yield "", matrix, class_names(found)
    for task, matrix in found["test"].get("confusions", {}).items():
        yield task, matrix, list(map(str, found["data"]["classes"][task]))


def _confusions(found: Mapping[str, Any]) -> Iterator[str]:
    unit = found["test"].get("unit", "pixels")
    for task, matrix, names in matrices(found):
        chart = page.figures({f"Share of the {unit} of each true class (row) that were predicted as each (column)": (
            plots.confusion(matrix, names)
        )})  # fmt: skip
        errors = page.table(("largest errors", unit, "of the class"), confusions(matrix, names))
        yield page.section(f"Confusion of classes ({f'{task}, ' if task else ''}{unit})", chart, errors)


def _compact(values: Any) -> str:
    import yaml

    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True)
