"""The metrics file: one CSV row for every moment at which something was measured, readable while the run goes on."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from shared.store import write_atomically
from shared.training import processes


class MetricsFile(Logger):
    """Columns ``step`` (of the optimiser, from 0), ``epoch``, then metrics as they first appear; blank: not measured.

    The first process writes it.

    keep: rows of an earlier run below this step stay (resume); None starts the file anew.
    """

    def __init__(self, path: Path, keep: int | None = None):
        super().__init__()
        self.path = path
        self.columns, self.rows = ["step", "epoch"], []
        if keep is not None and path.exists():
            whole, _, _ = path.read_bytes().decode().rpartition("\n")  # a kill may have cut the last row short
            reader = csv.DictReader(whole.splitlines())
            self.rows = [row for row in reader if int(row["step"]) < keep]
            self.columns = list(reader.fieldnames or self.columns)
        self._rewrite()

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """A run directory holds its recipe already."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if processes.rank() > 0:
            return
        row = {"step": step or 0, **metrics}
        if "epoch" in row:
            row["epoch"] = int(row["epoch"])
        self.rows.append(row)
        if new := [name for name in row if name not in self.columns]:
            self.columns += new
            self._rewrite()
        else:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerow(row)

    def _rewrite(self) -> None:
        if processes.rank() > 0:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.path, text.getvalue().encode())
