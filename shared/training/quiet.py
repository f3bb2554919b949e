"""Quiet: training without the notices of its libraries that are about what is done here on purpose."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

# Deliberate here: the data choose their workers, frozen modules stay in eval mode, a device may be left unused, a task
# looks at its batches, a half-precision scaler may skip the first step, and results are of all processes already. The
# last message is between Lightning 2.6 and torch 2.13.
_QUIET = (
    ".*does not have many workers",
    ".*in eval mode at the start of training",
    "GPU available but not used",
    "You have overridden `on_before_batch_transfer`",
    "Detected call of `lr_scheduler.step",
    "It is recommended to use `self.log",
    "You're resuming from a checkpoint that ended before the epoch ended",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's notices, and without the warnings about what is done here on purpose."""
    logs = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for message in _QUIET:
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            for log, level in zip(logs, levels, strict=True):
                log.setLevel(level)
