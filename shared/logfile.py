"""The log of a run: a file that says what is done, warned of, and what stopped it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shared.errors import RequestError, WorkError

LOG = logging.getLogger("omniadapt")


class _LogFile(logging.FileHandler):
    """A log that cannot be written stops the work; by itself ``logging`` would print a traceback and go on."""

    def __init__(self, path: Path):
        try:
            super().__init__(path, encoding="utf-8")
        except OSError as error:
            raise WorkError(f"{path}: cannot be written: {error.strerror or error}") from error

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise WorkError(f"{self.baseFilename}: cannot be written: {error.strerror or error}") from error
        super().handleError(record)


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Within it, our and Lightning's messages and all warnings also go to ``path``, and so does a failure."""
    file, terminal = _LogFile(path), logging.StreamHandler()
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    warned = logging.getLogger("py.warnings")
    pairs = [(LOG, file), (logging.getLogger("lightning.pytorch"), file), (warned, file), (warned, terminal)]
    before = LOG.level
    LOG.setLevel(logging.INFO)
    for logger, handler in pairs:
        logger.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    except BaseException as error:
        known = isinstance(error, (RequestError, WorkError, KeyboardInterrupt, SystemExit))
        with suppress(WorkError):  # the disk that stopped the work stops its log as well
            LOG.error("stopped: %s: %s", type(error).__name__, error, exc_info=not known)
        raise
    finally:
        logging.captureWarnings(False)
        LOG.setLevel(before)
        for logger, handler in pairs:
            logger.removeHandler(handler)
        with suppress(OSError):  # what could not be written was told when it was logged
            file.close()
