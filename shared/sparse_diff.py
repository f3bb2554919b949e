"""Files of sparse differences as composable-sft publishes them: ``pytorch_diff.bin`` (Ansell et al., 2022).

A file is ``{"diffs": {name: {"size", "index_steps", "values"}}, "abs": {name: tensor}}``. Entries are numbered with the
first index fastest; ``index_steps`` is the first number, then each one's distance from the one before.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.errors import RequestError
from shared.store import check_readable, write_atomically

EPSILON = 1e-7  # differences up to this are dropped, as published


def encode(diff: Tensor, epsilon: float = EPSILON) -> dict[str, Any]:
    """A difference of any shape to its entry: ``size``, ``index_steps`` and ``values``."""
    flat = _turned(diff.detach().cpu()).reshape(-1)
    places = (flat.abs() > epsilon).nonzero().flatten()
    steps = torch.diff(places, prepend=places.new_zeros(1))
    return {"size": diff.shape, "index_steps": steps.tolist(), "values": flat[places].clone()}


def decode(entry: Mapping[str, Any], where: str = "diff") -> Tensor:
    """The difference an entry spells. Raises RequestError where its parts do not belong together."""
    try:
        size = torch.Size(int(n) for n in entry["size"])
        places = torch.as_tensor([int(step) for step in entry["index_steps"]], dtype=torch.int64).cumsum(0)
        values = torch.as_tensor(entry["values"])
        rising = bool((places.diff() > 0).all())
        fits = places.shape == values.shape and rising and values.is_floating_point() and bool(values.isfinite().all())
        if not fits or (len(places) and not 0 <= int(places[0]) <= int(places[-1]) < size.numel()):
            raise ValueError
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        raise RequestError(f"{where}: no sparse difference: its size, index_steps and values do not fit") from None
    flat = torch.zeros(size.numel(), dtype=values.dtype)
    flat[places] = values
    return _turned(flat.reshape(size[::-1]))


def read(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Differences and whole tensors ("abs": the head) by their published names, from a file or the folder it is in.

    Nothing is unpickled but tensors and numbers. Raises RequestError where it cannot be read as such a file.
    """
    import numpy as np

    path = Path(path) / "pytorch_diff.bin" if Path(path).is_dir() else Path(path)
    check_readable(path)
    scalar = np.int64(0).__reduce__()[0]  # the published files hold their first step as a number of NumPy's
    allowed: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals([*allowed, np.dtype, type(np.dtype(np.int64))]):
            held = torch.load(path, map_location="cpu", weights_only=True)
        diffs, whole = held.get("diffs", {}), held.get("abs", {})
        pairs = [*diffs.items(), *whole.items()]
    except pickle.UnpicklingError as error:
        raise RequestError(
            f"{path}: it holds more than tensors and numbers, or is no torch file; not loaded"
        ) from error
    except (RuntimeError, EOFError, ValueError, AttributeError, TypeError) as error:
        raise RequestError(f"{path}: not a file of sparse differences ({type(error).__name__})") from error
    if not pairs or not all(isinstance(t, Tensor) and bool(t.isfinite().all()) for t in whole.values()):
        raise RequestError(f"{path}: it holds no sparse difference, or a tensor that is not finite")
    return {name: decode(entry, f"{path}: {name}") for name, entry in diffs.items()}, dict(whole)


def write(path: str | os.PathLike, diffs: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
    """Write differences and whole tensors as the published code reads them; whole or not at all."""
    data = io.BytesIO()
    kept = {name: tensor.detach().cpu().clone() for name, tensor in whole.items()}
    torch.save({"diffs": {name: encode(diff) for name, diff in diffs.items()}, "abs": kept}, data)
    write_atomically(Path(path), data.getvalue())


def _turned(tensor: Tensor) -> Tensor:
    """Axes in the opposite order."""
    return tensor.permute(*reversed(range(tensor.ndim))) if tensor.ndim > 1 else tensor
