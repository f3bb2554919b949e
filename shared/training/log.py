"""The metrics file: one CSV row for every moment at which something was measured, readable while the run goes on."""

from __future__ import annotations

import csv
import errno
import io
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from shared.errors import WorkError
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
            self._append(row)

    def _append(self, row: Mapping[str, Any]) -> None:
        """Add a row, whole or not at all."""
        text = io.StringIO()
        csv.DictWriter(text, self.columns).writerow(row)
        end = self.path.stat().st_size
        try:
            with open(self.path, "ab", buffering=0) as file:
                data = text.getvalue().encode()
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, end)
            raise WorkError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def _rewrite(self) -> None:
        if processes.rank() > 0:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.path, text.getvalue().encode())
