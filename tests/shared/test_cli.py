"""The command line: statuses, one line for a failure, and what each command prints."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from shared import cli, store
from shared.commands.facts import LISTS
from shared.errors import WorkError


@pytest.fixture
def say(capsys, tmp_path, monkeypatch):
    """Runs a command in an empty folder and gives (status, output, error output)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        status = cli.main(words)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for command in ("run", "compare", "predict", "plan", "count", "list", "show", "inspect"):
        assert f"    {command} " in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the following arguments are required: COMMAND (omniadapt --help shows how)"),
        (("frobnicate",), "invalid choice: 'frobnicate'"),
        (("run",), "the following arguments are required: RECIPE"),
        (("run", "quickstart", "--tinny"), "unknown argument '--tinny' (omniadapt run --help shows how)"),
        (("show", "LoRA", "more"), "unknown argument 'more'"),
        (("run", "quickstart", "--tiny", "method.rank"), "override 'method.rank': write key.path=value"),
        (("run", "quickstat"), "no recipe 'quickstat'"),
        (("list", "method"), "invalid choice: 'method'"),
        (("show", "lorra"), "nothing is called 'lorra'; nearest: 'LoRA'; see omniadapt list"),
        (("inspect", "gone.safetensors"), "gone.safetensors: no such file"),
        (("run", "quickstart", "--resume"), "nothing to resume: runs/quickstart holds no run"),
        (("compare", "quickstart", "--methods", ""), "compare: name at least one method"),
        (("compare", "quickstart", "--methods", "lora,LoRA"), "compare: LoRA is named twice"),
        (("compare", "quickstart", "--methods", "lora,lor"), "no method is called 'lor'; nearest: 'LoRA'"),
        (("compare", "quickstart", "--methods", "lora", "--seeds", "1,x"), "wants whole numbers with commas between"),
        (("compare", "quickstart"), "compare: name at least one method"),
    ],
)
def test_a_wrong_request_is_one_line_and_status_2(say, words, message):
    status, out, err = say(*words)
    assert (status, out) == (2, "")
    assert err.startswith("omniadapt: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (WorkError("the loss is nan"), 1, "omniadapt: the loss is nan\n"),
        (KeyError("x"), 1, "omniadapt: KeyError: 'x' (--debug shows where)\n"),
        (RuntimeError("two\nlines"), 1, "omniadapt: RuntimeError: two lines (--debug shows where)\n"),
        (KeyboardInterrupt(), 130, "omniadapt: interrupted\n"),
    ],
)
def test_failures_of_the_work(say, monkeypatch, error, status, line):
    def fail(*_):
        raise error

    monkeypatch.setattr("shared.listing.rows", fail)
    assert say("list", "methods") == (status, "", line)


def test_a_reader_that_has_gone_is_no_failure():
    code = "import sys, shared.cli; sys.exit(shared.cli.main(['list', 'methods', '--json']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert (process.communicate()[1], process.returncode) == (b"", 0)


def test_the_interrupt_that_lightning_turns_into_an_exit(say, monkeypatch):
    def fail(*_):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904

    monkeypatch.setattr("shared.listing.rows", fail)
    status, _, err = say("list", "methods")
    assert status == 130
    assert err.startswith("omniadapt: interrupted")


def test_debug_shows_the_traceback(say):
    with pytest.raises(ValueError, match="no recipe 'gone'"):
        say("run", "gone", "--debug")


def test_list_and_show(say):
    status, out, _ = say("list", "methods", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert status == 0
    assert rows["LoRA"]["module"] == "shared.methods.lora"
    assert sum(line.startswith("  ") for line in say("list", "methods")[1].splitlines()) == len(rows)
    assert {row["name"] for row in json.loads(say("list", "recipes", "--json")[1])} >= {
        "quickstart", "remote_sensing/cloud_adapter", "remote_sensing/landsat_biome",
    }  # fmt: skip
    assert all(row["summary"] for what in LISTS for row in json.loads(say("list", what, "--json")[1]))
    shown = say("show", "lora")[1]
    assert shown.startswith("LoRA: method of shared.methods.lora\n")
    assert "\n  rank: int = 8\n" in shown
    assert "  name: str (must be given)\n" in say("show", "TimmViT")[1]
    assert "type: GeneratedScenes" in say("show", "quickstart")[1]


def test_count_gives_the_published_numbers_without_data_or_weights(say):
    status, out, _ = say("count", "remote_sensing/cloud_adapter", "--json")
    assert status == 0
    assert json.loads(out)["adapter"] == 1_828_425
    vit_b = say(
        "count",
        "remote_sensing/cloud_adapter",
        "--json",
        "backbone.name=vit_base_patch14_dinov2.lvd142m",
        "backbone.depths=null",
    )
    assert json.loads(vit_b[1])["adapter"] == 919_113
    status, out, _ = say("count", "quickstart", "--tiny")
    numbers = [int(line.split()[1].replace(",", "")) for line in out.splitlines()]
    assert numbers[0] == numbers[1] + numbers[2]
    assert [line.split()[0] for line in out.splitlines()] == ["trainable", "adapter", "head", "frozen"]


def test_plan_predicts_without_leaving_anything(say, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = say("plan", "images/s2a", "--tiny", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["trainable"] == 3683
    assert found["blocks"] == [2, 2]
    assert found["forward_flops"] > 0 < found["saved_bytes"]
    assert all(found[f"{name}_seconds"] > 0 for name in ("step", "epoch", "train", "own", "limit", "full"))
    status, out, _ = say("plan", "images/s2a", "--tiny")
    assert "step of full fine-tuning" in out
    assert "of its limit" in out
    assert list(tmp_path.iterdir()) == []
    status, _, err = say("plan", "images/s2a", "--tiny", "trainer.devices=2")
    assert status == 2
    assert "costs are predicted for one process" in err


def test_count_says_what_only_the_files_could_tell(say):
    data = "data={type: FolderScenes, images: gone, masks: gone, classes: [a, b]}"
    status, _, err = say("count", "quickstart", data)
    assert status == 2
    assert "backbone: AerialViT needs bands, which neither the data's settings nor the backbone state" in err


@pytest.fixture
def adapter(tmp_path):
    import torch

    header = {
        "method": {"type": "LoRA", "arguments": {"rank": 4}},
        "backbone": {"name": "vit", "fingerprint": "0123456789abcdef"},
        "sites": ["blocks/0/attn/qkv:query"],
        "metrics": {"miou": 0.5},
        "version": "0.1.0",
        "extra": {},
    }
    store.save(tmp_path / "a.safetensors", {"adapter.x.down": torch.zeros(4, 8), "head.bias": torch.zeros(())}, header)
    return tmp_path / "a.safetensors"


def test_inspect(say, adapter):
    status, out, _ = say("inspect", str(adapter))
    assert status == 0
    for text in (
        f"{adapter.stat().st_size:,} bytes, written by omniadapt 0.1.0",
        "LoRA rank=4", "vit, fingerprint 0123456789abcdef", "miou=0.5", "  blocks/0/attn/qkv:query",
        "2, 33 values", "  adapter.x.down  F32 4 x 8", "  head.bias  F32 scalar",
    ):  # fmt: skip
        assert text in out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-7], "cut short"),
        (lambda data: data[:5], "cut short or not a safetensors file"),
        (lambda data: b"", "cut short or not a safetensors file (0 bytes)"),
        (lambda data: b"PK\x03\x04" + bytes(200), "safetensors"),
        (lambda data: data.replace(b"omniadapt", b"otherthin"), "not an omniadapt adapter"),
    ],
)
def test_inspect_tells_a_damaged_or_foreign_file_in_one_line(say, adapter, damage, message):
    adapter.write_bytes(damage(adapter.read_bytes()))
    status, out, err = say("inspect", str(adapter))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert "a.safetensors" in err


@pytest.mark.parametrize("command", ["run", "compare", "count"])
def test_a_wrong_setting_is_told_before_torch_is_imported(command) -> None:
    code = "import sys; from shared.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    words = [sys.executable, "-c", code, command, "quickstart", "method.rnk=8"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "LoRA has no such setting; nearest: 'rank'" in done.stderr
    assert done.returncode == 0
