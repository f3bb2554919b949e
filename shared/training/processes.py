"""Processes: which of a run's processes this is, and how they are started on one machine."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shared.errors import RequestError, WorkError

if TYPE_CHECKING:
    from torch import Tensor


def launched() -> bool:
    """Whether this process was started by torchrun or ``launch``, as one of a group."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """The number of this process in its group; process 0 writes and prints."""
    return int(os.environ["RANK"]) if launched() else 0


def world() -> int:
    """The number of processes in the group."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def total(tensor: Tensor) -> Tensor:
    """The sum of ``tensor`` over all processes; alone, itself.

    Its gradient is right where every process makes the same loss of it and gradients are then averaged, as DDP does.
    """
    if world() == 1:
        return tensor
    import torch.distributed

    summed = tensor.detach().clone()
    torch.distributed.all_reduce(summed)
    return summed + world() * (tensor - tensor.detach())  # the last is 0 and carries the gradient


def launch(count: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function(*args)`` in ``count`` new processes on this machine, as torchrun would.

    function: at the top of a module; it, ``args`` and what it returns must pickle.

    Returns what the first process returns.

    Raises the RequestError or WorkError of the process that failed first, WorkError for other failures; the other
    processes are ended then, and where this one is.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        1, 1, count, run_id=uuid.uuid4().hex, max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost",
    )  # fmt: skip
    # torch logs what is raised here, and leaves its signal handlers behind.
    log = logging.getLogger("torch")
    level, handlers = log.level, {number: signal.getsignal(number) for number in _STOPS}
    log.setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns where no step left a parameter out
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    try:
        return elastic_launch(config, _work)(function, *args)[0]
    except ChildFailedError as failed:
        raise _cause(failed) from None
    except SignalException as stopped:
        if stopped.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise WorkError(f"stopped by {stopped.sigval.name}") from None
    finally:
        log.setLevel(level)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _work(function: Callable[..., Any], *args: Any) -> Any:
    multiprocessing.set_start_method(None, force=True)  # else the workers of loaders are spawned too, for seconds each
    return function(*args)


_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def _cause(failed: Any) -> Exception:
    """The failure of the process that failed first, of its own kind."""
    number, failure = failed.get_first_failure()
    said = failure.message if isinstance(failure.message, str) else failure.message["message"]
    kind, _, text = said.partition(": ")
    known = {"RequestError": RequestError, "WorkError": WorkError}
    return known[kind](text) if kind in known else WorkError(f"process {number} failed: {said}")
