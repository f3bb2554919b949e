"""What a comparison says of efficiency: inference by form, and where an adapter does not pay (Mundra et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shared.latency import FORMS

if TYPE_CHECKING:
    from shared.compare import Row

NOISE = 1.05  # a ratio that on a busy machine says nothing yet
REFERENCE = "Full"
NOTE = (
    "The fastest of several calls; the forms take turns. Folded is what inference does by itself; merged is written "
    "into the weights."
)


def latencies(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Inference of a batch by form as a share of the bare model's, and its time for one sample and a batch."""
    heads = ["method", "bare, one", "bare, batch", *(f"{form}, batch" for form in FORMS[1:]), "folded, one"]
    lines = []
    for row in rows:
        one, batch = row.latency["one"], row.latency["batch"]
        times = [f"{1000 * taken['bare']:.1f} ms" for taken in (one, batch)]
        shares = [_share(batch, form) for form in FORMS[1:]]
        lines.append([row.method, *times, *shares, _share(one, "folded")])
    return heads, lines


def verdicts(rows: Sequence[Row], score: str, *, smaller: bool = False) -> list[str]:
    """For each way but full fine-tuning what it gains and where it does not pay; nothing where full is not among them.

    score: the test result they are ranked by.  smaller: whether a smaller one is better.
    """
    full = next((row for row in rows if row.method.lower().startswith(REFERENCE.lower())), None)
    return [] if full is None else [_verdict(row, full, score, smaller) for row in rows if row is not full]


def _verdict(row: Row, full: Row, score: str, smaller: bool) -> str:
    gains, costs = [], []
    mine, theirs = row.scores[score], full.scores[score]
    if mine is not None and theirs is not None:
        within = abs(mine - theirs) <= max(row.spreads[score], full.spreads[score])
        word = "as good within the spread" if within else "better" if (mine < theirs) == smaller else "worse"
        (costs if word == "worse" else gains).append(f"{word} ({mine:.3f}, full {theirs:.3f})")
    ratios = {
        "trains in {:.2f} of the time": row.train_seconds / full.train_seconds,
        "peaks at {:.2f} of the memory": row.peak_bytes / full.peak_bytes,
        "its file is {:.3f} of the size": row.file_bytes / full.file_bytes,
    }
    for text, ratio in ratios.items():
        if ratio > NOISE:
            costs.append(text.format(ratio))
        elif ratio < 1 / NOISE:
            gains.append(text.format(ratio))
    if (share := _cheapest(row)) > NOISE:  # below 1 there is only noise
        costs.append(f"inference takes {share:.2f} of the bare model's time")
    parts = [", ".join(gains)] * bool(gains) + [f"against it: {', '.join(costs)}"] * bool(costs)
    return f"{row.method}: " + ("; ".join(parts) or "costs what full fine-tuning costs")


def _cheapest(row: Row) -> float:
    """Inference in its cheapest form as a share of the bare model's."""
    batch = row.latency["batch"]
    return min(batch.get("merged", batch["folded"]), batch["folded"]) / batch["bare"]


def _share(taken: dict[str, float], form: str) -> str:
    return f"{taken[form] / taken['bare']:.2f}" if form in taken else "–"
