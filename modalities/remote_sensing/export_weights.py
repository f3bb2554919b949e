"""From the adapter file of a pretraining run to a weights file of its backbone alone, in half precision.

python -m modalities.remote_sensing.export_weights RUN/adapter.safetensors WEIGHTS.safetensors
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from shared import store
from shared.errors import RequestError, exit_status

PREFIX = "backbone.model."


def export_weights(run: Path, weights: Path) -> int:
    """Write the fully trained backbone of an adapter file as float16 under timm's names, with the run's metrics in
    its header, and return the size in bytes.

    Raises RequestError where the file holds no trained backbone, or a value that float16 cannot hold.
    """
    from safetensors.torch import save

    tensors, header = store.read(run)
    own = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    if not own:
        raise RequestError(f"{run}: it holds no trained backbone; export a run of the method Full")
    half = {name: tensor.half() for name, tensor in own.items()}
    if large := next((name for name, tensor in half.items() if not torch.isfinite(tensor).all()), None):
        raise RequestError(f"{run}: {large} has values beyond the range of float16")
    facts = {key: header[key] for key in ("backbone", "metrics")}
    content = save(half, {"format": "pt", "pretraining": json.dumps(facts)})
    store.write_atomically(weights, content)
    return len(content)


@exit_status
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m modalities.remote_sensing.export_weights", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("run", type=Path, help="adapter file of a run of remote_sensing/pretrain")
    parser.add_argument("weights", type=Path, help="the .safetensors file to write")
    given = parser.parse_args(arguments)
    size = export_weights(given.run, given.weights)
    print(f"{given.weights}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    sys.exit(main())
