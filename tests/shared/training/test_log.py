"""The metrics file goes on where a run does."""

from __future__ import annotations

from pathlib import Path

from shared.training.log import MetricsFile


def test_a_row_that_a_kill_cut_short_goes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,train/loss\n0,0,0.5\n1,0,0.25\n1")  # of 10,2,...
    MetricsFile(path, keep=5)
    assert path.read_text().split() == ["step,epoch,train/loss", "0,0,0.5", "1,0,0.25"]
    path.write_text("ste")
    MetricsFile(path, keep=5)
    assert path.read_text().split() == ["step,epoch"]
