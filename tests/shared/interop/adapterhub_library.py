"""What AdapterHub's library computes; run by a Python that has it (``.venv/adapterhub``), beside none of our code.

``python adapterhub_library.py write CASES FOLDER`` makes a model and an adapter for each case of a JSON file (name to
family, shape and settings), and writes the adapter as the library does, with the model's weights, tokens and states.
``… read FOLDER`` loads, into each of those models, the adapter that the folder ``ours`` beside holds, and writes its
states.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import adapters  # type: ignore[import-not-found]
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

MODELS: dict[str, Any] = {"bert": (BertConfig, BertModel), "roberta": (RobertaConfig, RobertaModel)}
TOKENS = torch.randint(2, 50, (3, 6), generator=torch.Generator().manual_seed(0))


def model(case: dict[str, Any], weights: Path | None = None) -> Any:
    """With random weights, or with those of a file."""
    config, kind = MODELS[case["family"]]
    torch.manual_seed(5)
    made = kind(config(**case["shape"]), add_pooling_layer=False).eval()
    if weights is not None:
        made.load_state_dict(load_file(weights))
    adapters.init(made)
    return made


@torch.no_grad()
def states(made: Any) -> torch.Tensor:
    return made(TOKENS, attention_mask=torch.ones_like(TOKENS)).last_hidden_state.contiguous()


def write(cases: dict[str, Any], folder: Path) -> None:
    for name, case in cases.items():
        made = model(case)
        (folder / name).mkdir(parents=True)
        state = made.state_dict().items()
        weights = {key: value.clone() for key, value in state if not key.startswith("prompt_tuning.")}
        save_file(weights, folder / name / "weights.safetensors")
        bare = states(made)
        made.add_adapter("theirs", config=adapters.BnConfig(**case["settings"]), set_active=True)
        torch.manual_seed(6)
        with torch.no_grad():
            for key, tensor in made.named_parameters():
                if ".theirs." in key:
                    tensor.copy_(torch.randn_like(tensor) * 0.4)
        made.save_adapter(str(folder / name / "adapter"), "theirs")
        out = {"tokens": TOKENS, "bare": bare, "states": states(made)}
        save_file(out, folder / name / "out.safetensors")
        (folder / name / "case.json").write_text(json.dumps(case))


def read(folder: Path) -> None:
    for place in sorted(folder.iterdir()):
        made = model(json.loads((place / "case.json").read_text()), place / "weights.safetensors")
        made.load_adapter(str(place / "ours"), set_active=True)
        save_file({"states": states(made)}, place / "again.safetensors")


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
    else:
        read(Path(sys.argv[2]))
