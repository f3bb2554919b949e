"""From a pretraining run to what the package ships: the weights of its backbone in half precision, and its tokenizer.

python -m modalities.language.export_weights RUN FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from shared import recipe, run, store
from shared.errors import RequestError, exit_status

PREFIX = "backbone."


def export_weights(folder: Path, out: Path) -> int:
    """Write ``small_lm.safetensors`` (float16, named as the library names them, with the run's metrics in its header)
    and ``small_lm_tokenizer.json`` into ``out``, and return the bytes of the weights.

    The tokenizer is trained again from the run's recipe, and must be the one the run had.

    Raises RequestError where the run holds no trained backbone, its data are no longer what they were, or float16
    cannot hold a value.
    """
    from safetensors.torch import save

    tensors, header = store.read(folder / run.ADAPTER)
    own = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    if not own:
        raise RequestError(f"{folder}: it holds no trained backbone; export a run of the method Full")
    data = recipe.load(str(folder / run.RECIPE)).build("data")
    if data.describe()["tokenizer_sha256"] != header["extra"]["data"]["tokenizer_sha256"]:
        raise RequestError(f"{folder}: its data are not what they were: they give another tokenizer")
    half = {name: tensor.half() for name, tensor in own.items() if name != "lm_head.weight"}  # tied to the embedding
    if large := next((name for name, tensor in half.items() if not torch.isfinite(tensor).all()), None):
        raise RequestError(f"{folder}: {large} has values beyond the range of float16")
    facts = {key: header[key] for key in ("backbone", "metrics")}
    content = save(half, {"format": "pt", "pretraining": json.dumps(facts)})
    store.write_atomically(out / "small_lm.safetensors", content)
    data.tokens.save(out / "small_lm_tokenizer.json")
    return len(content)


@exit_status
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m modalities.language.export_weights", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("run", type=Path, help="directory of a run of language/pretrain")
    parser.add_argument("folder", type=Path, help="where to write the two files")
    given = parser.parse_args(arguments)
    size = export_weights(given.run, given.folder)
    print(f"{given.folder}: weights of {size / 1e6:.2f} MB, and a tokenizer")


if __name__ == "__main__":
    sys.exit(main())
