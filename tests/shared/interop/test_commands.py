"""``omniadapt export`` and ``omniadapt import``: a run's adapter to peft and back."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

from modalities.language.backbones import SmallLM
from shared import run
from shared.adapted import Adapted
from shared.cli import main
from shared.interop import import_adapter

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
RECIPE = "language/quickstart_text"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "a"
    assert main(["run", RECIPE, "--tiny", "--output", str(folder)]) == 0
    return folder


def states(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens)[0]


def test_a_run_goes_to_peft_and_back(trained, tmp_path, capsys):
    assert main(["export", str(trained), "-o", str(tmp_path / "p"), "--as", "peft"]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "p" / name) for name in ("adapter_model.safetensors", "adapter_config.json")
    ]
    backbone = run.load(trained).task.model.cpu()
    backbone.head = None
    tokens = backbone.backbone.example()[0]
    ours = states(backbone, tokens)
    bare = SmallLM().eval()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(bare.model), tmp_path / "p").eval()
    assert not torch.allclose(ours, states(bare, tokens), atol=1e-4)
    assert torch.allclose(states(theirs, tokens), ours, atol=1e-5)

    file = tmp_path / "back.safetensors"
    assert main(["import", RECIPE, str(tmp_path / "p"), "--tiny", "-o", str(file)]) == 0
    assert capsys.readouterr().out.strip() == str(file)
    model = Adapted(bare)
    import_adapter(model, file)
    assert torch.equal(states(model, tokens), ours)
    assert main(["inspect", str(file)]) == 0
    assert "method    Imported" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "{run}", "-o", "{run}", "--as", "onnx"], "invalid choice: 'onnx'"),
        (["export", "{tmp}", "-o", "{tmp}", "--as", "peft"], "it is no run directory"),
        (["import", RECIPE, "{tmp}", "-o", "{tmp}/x", "--tiny"], "no adapter known here"),
        (["import", RECIPE, "{tmp}/y", "-o", "{tmp}/x", "backbone.weight=1"], "no such setting"),
        (["import", RECIPE, "{run}", "-o", "{run}/adapter.safetensors"], "it is there already"),
        (["import", RECIPE, "{run}/adapter.safetensors"], "required: -o"),
    ],
)
def test_a_wrong_request_is_one_line(trained, tmp_path, capsys, words, message):
    assert main([word.format(run=trained, tmp=tmp_path) for word in words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(trained, tmp_path, capsys):
    words = ["export", str(trained), "-o", str(tmp_path), "--as", "kohya"]
    assert main(words) == 0
    before = (tmp_path / "lora.safetensors").read_bytes()
    assert main(words) == 2
    assert "it is there already" in capsys.readouterr().err
    assert (tmp_path / "lora.safetensors").read_bytes() == before
