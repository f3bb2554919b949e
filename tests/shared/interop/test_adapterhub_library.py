"""Bottlenecks from AdapterHub's own library and back to it: both compute the same.

It asks for an older transformers, so it lives in an environment of its own, ``.venv/adapterhub``, which ``make test``
makes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modalities.language.backbones import TransformersText
from shared.adapted import Adapted
from shared.errors import RequestError
from shared.interop import export_adapter, import_adapter
from shared.methods import BertBottleneck, LoRA
from tests.shared.hosts import HOSTS, SMALL_TEXT
from tests.shared.interop.test_adapterhub import CONFIGS, HOULSBY, PFEIFFER

PYTHON = Path(sys.prefix) / "adapterhub" / "bin" / "python"
SCRIPT = Path(__file__).with_name("adapterhub_library.py")
SETTINGS = {
    **CONFIGS,
    "odd_width": PFEIFFER | {"reduction_factor": 3},
    "odd_widths": HOULSBY | {"reduction_factor": {"0": 5, "default": 3}},
    "linear": PFEIFFER | {"non_linearity": "linear"},
    "scaled": HOULSBY | {"scaling": 0.5, "non_linearity": "tanh"},
}


def library(*words: str | Path) -> None:
    done = subprocess.run([PYTHON, SCRIPT, *words], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def backbone(folder: Path) -> TransformersText:
    case = json.loads((folder / "case.json").read_text())
    made = TransformersText(name=case["family"], weights="random", config=case["shape"]).eval()
    missing, unexpected = made.model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
    assert not unexpected
    assert all("position_ids" in name or "token_type_ids" in name for name in missing)
    return made


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory) -> Path:
    """A folder for each case: the library's adapter, ours made from it, and what the library says with each."""
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON}: no such Python; make test makes it")
    folder = tmp_path_factory.mktemp("adapterhub")
    shape = {**SMALL_TEXT, "intermediate_size": 24, "max_position_embeddings": 20}
    cases = {
        f"{name}-{family}": {"family": family, "shape": shape, "settings": settings}
        for name, settings in SETTINGS.items()
        for family in ("bert", "roberta")
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    library("write", folder / "cases.json", folder / "cases")
    for place in (folder / "cases").iterdir():
        model = Adapted(backbone(place))
        import_adapter(model, place / "adapter", name="again")
        export_adapter(model, place / "ours", format="adapterhub")
    library("read", folder / "cases")
    return folder / "cases"


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("case", SETTINGS)
def test_there_and_back(exchanged, case, family):
    folder = exchanged / f"{case}-{family}"
    told = load_file(folder / "out.safetensors")
    with torch.no_grad():
        model = Adapted(backbone(folder))
        assert torch.allclose(model(told["tokens"]).states, told["bare"], atol=1e-5)
        import_adapter(model, folder / "adapter")
        assert torch.allclose(model(told["tokens"]).states, told["states"], atol=1e-5)
    assert not torch.allclose(told["states"], told["bare"], atol=1e-2)
    assert torch.allclose(load_file(folder / "again.safetensors")["states"], told["states"], atol=1e-5)


def test_what_a_folder_cannot_hold_is_named(tmp_path):
    model = Adapted(HOSTS["bert"]()[0].eval())
    model.add(LoRA(rank=2), name="low")
    refused(model, tmp_path, "holds one BertBottleneck; active here: low")
    model.add(BertBottleneck(width=4), name="b")
    model.activate("low", "b")
    refused(model, tmp_path, "active here: low, b")
    model.activate("b", strength=0.5)
    refused(model, tmp_path, "'b' is active at 0.5")
    model.activate("b")
    assert [path.name for path in export_adapter(model, tmp_path / "x", format="adapterhub")] == [
        "adapter_config.json", "pytorch_adapter.bin",
    ]  # fmt: skip
    refused(model, tmp_path / "x", "it is there already")
    refused(Adapted(HOSTS["llama"]()[0].eval()), tmp_path, "for BERT and RoBERTa")


def refused(model: Adapted, folder: Path, message: str) -> None:
    before = sorted(folder.iterdir())
    with pytest.raises(RequestError, match=message) as error:
        export_adapter(model, folder, format="adapterhub")
    assert "\n" not in str(error.value)
    assert sorted(folder.iterdir()) == before
