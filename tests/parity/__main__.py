"""Replay golden cases: ``python -m tests.parity CASE.npz ...`` prints ``<slug> <max abs diff>`` for each.

The slug is the file's name up to the first dot, or its longest leading part for which there is a replay. Exit status
0 where every difference is at most 1e-4, 1 where one is larger, 2 where a case cannot be replayed.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

from shared.errors import RequestError

LIMIT = 1e-4


def slug_of(path: Path) -> str:
    """The system a case belongs to, by its file name: ``cloud_adapter.npz``, ``cloud_adapter_seed7.npz``."""
    known = sorted(
        (p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith(("_", "test_"))), key=len
    )
    fitting = [
        name for name in known if path.stem == name or path.stem.startswith((f"{name}_", f"{name}.", f"{name}-"))
    ]
    if not fitting:
        raise RequestError(f"{path}: no replay for this system; there are {', '.join(known)}")
    return fitting[-1]


def difference(path: Path) -> float:
    """The largest absolute difference between our outputs and the case's.

    Raises RequestError where the file is no case, or where an output is not replayed.
    """
    slug = slug_of(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            case = {name: archive[name] for name in archive.files}
        meta = json.loads(str(case.pop("meta")))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise RequestError(f"{path}: not a golden case ({error})") from error
    torch.manual_seed(0)
    pairs = importlib.import_module(f"tests.parity.{slug}").replay(case, meta)
    expected = {name for name in case if name.startswith("out.")}
    if missing := sorted(expected - pairs.keys()):
        raise RequestError(f"{path}: outputs not replayed: {', '.join(missing[:5])}")
    return max(_distance(name, *pair) for name, pair in pairs.items())


def _distance(name: str, ours: torch.Tensor, theirs: np.ndarray | torch.Tensor) -> float:
    theirs = torch.as_tensor(theirs)
    if ours.shape != theirs.shape:
        raise RequestError(f"{name}: shape {tuple(ours.shape)} where the published code gives {tuple(theirs.shape)}")
    gap = (ours.detach().double() - theirs.double()).abs()
    return float("inf") if bool(gap.isnan().any()) else float(gap.max()) if gap.numel() else 0.0


def main(arguments: list[str]) -> int:
    if not arguments:
        print("usage: python -m tests.parity CASE.npz ...", file=sys.stderr)
        return 2
    status = 0
    for argument in arguments:
        path = Path(argument)
        try:
            worst = difference(path)
        except RequestError as error:
            print(error, file=sys.stderr)
            status = 2
            continue
        print(f"{slug_of(path)} {worst:.3g}")
        status = status or int(not worst <= LIMIT)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
