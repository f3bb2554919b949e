"""Instructions: the prompt, what is scored, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from modalities.language.backbones import SmallLM
from modalities.language.data import Instructions
from modalities.language.data.instructions import prompted
from modalities.language.modelling import LanguageModelling
from shared.adapted import adapt
from shared.errors import RequestError
from shared.methods import LoRA
from shared.training.optimiser import Optimiser

ENTRIES = [{"instruction": f"Add {i} and {i + 1}.", "input": "", "output": f"It is {2 * i + 1}."} for i in range(30)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sums.json"
    path.write_text(json.dumps(ENTRIES))
    return path


def data(file, **more) -> Instructions:
    return Instructions(**{"files": [file], "validation": 0.1, "test": 0.1, "batch_size": 4, **more})


def test_the_prompt_with_and_without_an_input():
    assert prompted("Say hello.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hello.\n\n### Response:\n"
    )
    paired = prompted("Translate.", "Guten Tag", indentation=2)
    assert "describes a task, paired with an input that provides further context. Write" in paired
    assert "\n  ### Input:\n  Guten Tag\n  \n  ### Response:\n  " in paired


@pytest.mark.parametrize("scored", ["response", "all"])
def test_what_is_scored_decodes_to_the_response_or_to_everything(file, scored):
    one = data(file, scored=scored)
    batch = next(iter(one.test()))
    assert batch["tokens"].shape == batch["mask"].shape == batch["scored"].shape
    assert not (batch["scored"] & ~batch["mask"]).any()
    for i, name in enumerate(batch["name"]):
        entry = ENTRIES[int(name.split("[")[1][:-1])]
        text = one.tokens.decode(batch["tokens"][i][batch["scored"][i]].tolist()).strip()
        whole = prompted(entry["instruction"]) + entry["output"]
        assert text == (entry["output"] if scored == "response" else whole.strip())
        assert int(batch["bytes"][i]) == len((entry["output"] if scored == "response" else whole).encode())


def test_the_splits_share_nothing_and_hold_all(file):
    one = data(file)
    names = [row.name for part in one.rows.values() for row in part]
    assert len(names) == len(set(names)) == 30
    assert one.describe()["splits"]["train"]["instructions"] == len(one.rows["train"]) > 20


def test_the_loss_is_that_of_the_scored_tokens(file):
    model = adapt(SmallLM(lm_head=True), LoRA(rank=2))
    one = data(file)
    task = LanguageModelling(model, one, Optimiser(learning_rate=1e-3))
    batch = next(iter(one.train()))
    with torch.no_grad():
        logits = task.outputs(batch).log_softmax(-1)
        chosen = [-logits[i, j - 1, batch["tokens"][i, j]] for i, j in batch["scored"].nonzero().tolist()]
        assert torch.isclose(task.loss(batch), torch.stack(chosen).mean(), atol=1e-5)


def test_lines_of_json_are_read_too(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, ENTRIES)))
    assert {row.name for row in data(path).rows["test"]} <= {f"sums.jsonl:{i}" for i in range(1, 31)}


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (None, {}, "no such file"),
        ("[1", {}, "no JSON"),
        ("{}", {}, "wants a list of objects"),
        ("[]", {}, "there is no instruction"),
        ('[{"instruction": "a"}]', {}, r"x.json\[0\]: wants an object with texts under 'instruction' and 'output'"),
        ('[{"instruction": "a", "output": 3}]', {}, "wants an object with texts"),
        (json.dumps(ENTRIES), {"max_length": 12}, "its prompt alone fills max_length 12"),
        (json.dumps(ENTRIES), {"scored": "none"}, "scored 'none': use 'response' or 'all'"),
        (json.dumps(ENTRIES), {"batch_size": 0}, "batch_size 0"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, content, more, message):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RequestError, match=message):
        data(path, **more)
