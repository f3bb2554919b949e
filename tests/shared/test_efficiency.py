"""What a comparison says of efficiency follows the numbers, whichever way they point."""

from __future__ import annotations

from shared.compare import Row
from shared.report.efficiency import latencies, verdicts


def row(method: str, score: float, seconds: float, folded: float, **more) -> Row:
    batch = {"bare": 0.010, "separate": 0.012, "folded": folded, **more.pop("merged", {})}
    facts = {"spreads": {"accuracy": 0.02}, "peak_bytes": 1e9, "file_bytes": 1e6, **more}
    return Row(
        method=method, seeds=3, scores={"accuracy": score}, trainable=10, train_seconds=seconds, step_seconds=0.1,
        latency={"one": {"bare": 0.001, "folded": 0.002}, "batch": batch}, **facts,
    )  # fmt: skip


FULL = row("Full", 0.70, 100.0, 0.010)


def test_a_cheap_adapter_is_said_to_pay():
    cheap = row("LoRA", 0.75, 50.0, 0.010, file_bytes=1e3, merged={"merged": 0.010})
    assert verdicts([cheap, FULL], "accuracy") == [
        "LoRA: better (0.750, full 0.700), trains in 0.50 of the time, its file is 0.001 of the size"
    ]


def test_a_slow_one_is_said_not_to():
    slow = row("Slow", 0.60, 300.0, 0.030)
    assert verdicts([FULL, slow], "accuracy") == [
        "Slow: against it: worse (0.600, full 0.700), trains in 3.00 of the time, "
        "inference takes 3.00 of the bare model's time"
    ]


def test_what_is_within_the_spread_is_no_difference_and_a_loss_is_better_when_small():
    assert "as good within the spread (0.715" in verdicts([row("A", 0.715, 100, 0.01), FULL], "accuracy")[0]
    assert "better (0.600" in verdicts([row("A", 0.6, 100, 0.01), FULL], "accuracy", smaller=True)[0]
    assert "against it: worse (0.800" in verdicts([row("A", 0.8, 100, 0.01), FULL], "accuracy", smaller=True)[0]


def test_merging_counts_where_it_can_be_done():
    merges = row("A", 0.70, 100.0, 0.030, merged={"merged": 0.010})
    assert "inference" not in verdicts([merges, FULL], "accuracy")[0]


def test_without_full_fine_tuning_there_is_nothing_to_say():
    assert verdicts([row("LoRA", 0.7, 1.0, 0.01)], "accuracy") == []


def test_the_table_holds_shares_of_the_bare_model():
    heads, (line,) = latencies([row("A", 0.7, 1.0, 0.015)])
    assert heads == [
        "method",
        "bare, one",
        "bare, batch",
        "separate, batch",
        "folded, batch",
        "merged, batch",
        "folded, one",
    ]
    assert line == ["A", "1.0 ms", "10.0 ms", "1.20", "1.50", "–", "2.00"]
