"""The Hub: a run pushed, pulled and loaded over HTTP is the run, and whatever goes wrong is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

huggingface_hub = pytest.importorskip("huggingface_hub")
from huggingface_hub import constants, file_download  # noqa: E402
from huggingface_hub.utils import close_session, disable_progress_bars, enable_progress_bars  # noqa: E402

from shared import cli, hub, load, recipe, run  # noqa: E402
from shared.card import base_model  # noqa: E402
from shared.errors import RequestError, WorkError  # noqa: E402
from tests.shared.fake_hub import READER, WRITER, FakeHub  # noqa: E402
from tests.shared.test_run import SMALL  # noqa: E402

# huggingface_hub calls httpx2 in a deprecated way where it uploads by LFS.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")

NAME = "some-one/small.run"


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The directory of a finished run."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "small.yaml").write_text(SMALL)
    run.run(recipe.load(str(folder / "small.yaml"), ["trainer.epochs=1"]), folder / "run")
    return folder / "run"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A Hub of one's own, with an empty cache and a token that may write."""
    fake = FakeHub()
    thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a Hub without it takes LFS
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    disable_progress_bars()
    close_session()
    yield fake
    enable_progress_bars()
    fake.go_on.set()
    fake.shutdown()
    thread.join()
    fake.server_close()
    close_session()


def pushed(server: FakeHub, done: Path) -> dict[str, bytes]:
    hub.push(done, NAME, licence="apache-2.0")
    return list(server.commits[NAME].values())[-1]


def one_line(capsys, *words: str) -> tuple[int, str]:
    status = cli.main(list(words))
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1), err
    return status, err


def test_a_push_holds_the_run_byte_for_byte_and_a_card(server, done, capsys):
    assert cli.main(["push", str(done), NAME, "--license", "mit"]) == 0
    files = list(server.commits[NAME].values())[-1]
    assert set(files) == {"adapter.safetensors", "recipe.yaml", "metrics.json", "README.md"}
    for name in ("adapter.safetensors", "recipe.yaml", "metrics.json"):
        assert files[name] == (done / name).read_bytes()
    sha = list(server.commits[NAME])[-1]
    assert capsys.readouterr().out == f"{server.url}/{NAME}/commit/{sha}\n"
    assert len(server.blobs) == 1  # the adapter file, by LFS
    hub.push(done, NAME, licence="cc-by-4.0")
    assert b"license: cc-by-4.0" in list(server.commits[NAME].values())[-1]["README.md"]
    assert len(server.commits[NAME]) == 2
    hub.push(done, "some-one/secret", licence="mit", private=True)
    assert server.private == {"some-one/secret"}


def test_the_card_says_what_the_run_recorded(done):
    text = hub.contents(done, NAME, licence="apache-2.0")["README.md"].decode()
    _, head, body = text.split("---\n", 2)
    metadata, found = yaml.safe_load(head), json.loads((done / "metrics.json").read_text())
    assert metadata["license"] == "apache-2.0"
    assert metadata["library_name"] == "omniadapt"
    assert metadata["tags"] == ["omniadapt", "adapter", "lora", "segmentation"]
    assert "base_model" not in metadata  # its weights are random
    (result,) = metadata["model-index"][0]["results"]
    assert result["dataset"] == {"name": "GeneratedScenes", "type": "GeneratedScenes", "split": "test"}
    told = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert told == {name: value for name, value in found["test"].items() if isinstance(value, float)}
    assert told["miou"] == found["test"]["miou"]
    for line in (
        "| parameters, trainable | 556 |",
        "| fingerprint of its weights | ",
        "The frozen weights of the backbone were never trained",
        "| classes | clear, cloud shadow, thin cloud, cloud |",
        f"| miou | {found['test']['miou']:.4g} |",
        "On the test split, at epoch 1, the best by validation/miou:",
        f"omniadapt pull {NAME}",
        f'trained = load("hf://{NAME}")',
        f"| torch | {found['versions']['torch']} |",
    ):
        assert line in body
    assert huggingface_hub.ModelCard(text).data.to_dict() == metadata


def test_the_base_model_is_named_where_the_weights_came_from_the_hub():
    assert base_model("vit, weights: timm hub: timm/vit_small.dino") == "timm/vit_small.dino"
    assert base_model("bert, weights: Hub: google/bert") == "google/bert"
    for other in (
        "vit, weights: random (seed 0)",
        "vit, weights: file: timm/vit.pt",
        "vit, weights: open_clip: laion",
        "",
    ):
        assert base_model(other) is None


def test_push_then_load_gives_the_same_outputs_bit_for_bit(server, done, tmp_path, capsys):
    pushed(server, done)
    near, far = run.load(done), load(f"hf://{NAME}")
    image = torch.randn(2, 4, 32, 32)
    assert torch.equal(near.task.scores(image), far.task.scores(image))
    assert near.identity == far.identity
    assert cli.main(["pull", NAME, "--output", str(tmp_path / "pulled")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'pulled'}\n"
    assert (tmp_path / "pulled/adapter.safetensors").read_bytes() == (done / "adapter.safetensors").read_bytes()
    assert not (tmp_path / "pulled/adapter.safetensors").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "pulled"]
    again = load(tmp_path / "pulled")
    assert torch.equal(near.task.scores(image), again.task.scores(image))
    model = run.build(recipe.load(str(done / "recipe.yaml")), SimpleNamespace(bands=4, classes=range(4)))
    model.load(f"hf://{NAME}")
    expected = near.task.model.trained_state()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.trained_state().items())
    assert cli.main(["inspect", f"hf://{NAME}"]) == 0
    assert "method    LoRA" in capsys.readouterr().out


def test_a_folder_of_the_same_layout_is_loaded_like_a_run(done, tmp_path, capsys):
    assert cli.main(["push", str(done), NAME, "--license", "mit", "--folder", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(hub.FILES)
    image = torch.randn(1, 4, 32, 32)
    assert torch.equal(load(tmp_path / "out").task.scores(image), run.load(done).task.scores(image))


def test_predict_takes_a_repository(server, done, tmp_path):
    from modalities.remote_sensing.data import GeneratedScenes

    pushed(server, done)
    GeneratedScenes(count=3, size=50, bands=("red", "green", "blue", "nir")).write(tmp_path / "scenes")
    scene = min((tmp_path / "scenes/images").iterdir())
    for place, out in ((str(done), "a.tif"), (f"hf://{NAME}", "b.tif")):
        assert cli.main(["predict", place, str(scene), "-o", str(tmp_path / out)]) == 0
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()


def test_a_revision_is_the_one_asked_for_and_only_run_files_are_fetched(server, done, tmp_path):
    files = pushed(server, done)
    first = list(server.commits[NAME])[-1]
    server.commit(NAME, {"README.md": b"another", "model.pkl": b"never", "pytorch_model.bin": b"never"})
    assert (hub.pull(hub.Address(NAME, first), tmp_path / "old") / "README.md").read_bytes() == files["README.md"]
    new = hub.pull(hub.Address.of(f"{NAME}@main"), tmp_path / "new")
    assert (new / "README.md").read_bytes() == b"another"
    assert sorted(path.name for path in new.iterdir()) == sorted(hub.FILES)
    assert not any("pkl" in line or ".bin" in line for line in server.asked)


def test_what_is_not_there_is_one_line(server, done, tmp_path, monkeypatch, capsys):
    pushed(server, done)
    target = ["--output", str(tmp_path / "pulled")]
    server.commit("some-one/other", {"README.md": b"no run"})
    server.private.add("some-one/secret")
    server.commit("some-one/secret", {"README.md": b"no run"})
    monkeypatch.delenv("HF_TOKEN")
    for words, message in (
        (["pull", "some-one/none"], f"hf://some-one/none: no such repository at {server.url}, or a private one"),
        (["pull", "some-one/secret"], "no such repository at"),
        (["pull", f"{NAME}@v2"], f"hf://{NAME}@v2: the repository at {server.url} has no such revision"),
        (["pull", "some-one/other"], "hf://some-one/other: the repository holds no adapter.safetensors"),
        (["pull", "no name"], "'no name' names no repository: write owner/name or owner/name@revision"),
        (["pull", "some-one/a..b"], "hf://some-one/a..b: no name of a repository"),
        (["predict", "hf://some-one/none", "x.tif", "-o", "y.tif"], "no such repository at"),
        (["predict", "hf://none", "x.tif", "-o", "y.tif"], "'hf:/none' names no repository"),
        (["inspect", "hf://some-one/none"], "no such repository at"),
    ):
        status, err = one_line(capsys, *words, *(target if words[0] == "pull" else []))
        assert (status, message in err) == (2, True), err
    assert not (tmp_path / "pulled").exists()
    status, err = one_line(capsys, "pull", NAME, "--output", str(done))
    assert (status, "is not an empty directory" in err) == (2, True)


def test_a_push_that_may_not_be_is_one_line(server, done, tmp_path, monkeypatch, capsys):
    words = ["push", str(done), NAME, "--license"]
    (tmp_path / "part").mkdir()
    (tmp_path / "part/recipe.yaml").write_bytes((done / "recipe.yaml").read_bytes())
    for asked, message in (
        ([*words, "Public Domain!"], "licence 'Public Domain!': as the Hub abbreviates it"),
        (["push", str(done), f"{NAME}@v1", "--license", "mit"], "a push goes to the main branch; name no revision"),
        (["push", str(done), "small", "--license", "mit"], "'small' names no repository"),
        (
            ["push", str(tmp_path / "part"), NAME, "--license", "mit"],
            "no directory of a finished run: it holds no a",
        ),
        (["push", str(done), NAME], "the following arguments are required: --license"),
    ):
        status, err = one_line(capsys, *asked)
        assert (status, message in err) == (2, True), err
    data = (done / "adapter.safetensors").read_bytes()
    (tmp_path / "part/metrics.json").write_bytes((done / "metrics.json").read_bytes())
    (tmp_path / "part/adapter.safetensors").write_bytes(data[:-3])
    status, err = one_line(capsys, "push", str(tmp_path / "part"), NAME, "--license", "mit")
    assert (status, "cut short" in err) == (2, True)
    (tmp_path / "part/adapter.safetensors").write_bytes(data)
    (tmp_path / "part/metrics.json").write_text("[]")
    status, err = one_line(capsys, "push", str(tmp_path / "part"), NAME, "--license", "mit")
    assert (status, "its metrics or recipe are not those of a run" in err) == (2, True)

    monkeypatch.setenv("HF_TOKEN", READER)
    assert "refuses the token (403)" in one_line(capsys, *words, "mit")[1]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "refuses the token (401)" in one_line(capsys, *words, "mit")[1]
    monkeypatch.delenv("HF_TOKEN")
    status, err = one_line(capsys, *words, "mit")
    assert (status, err) == (2, "omniadapt: no token of the Hub: set HF_TOKEN, or log in with: hf auth login\n")
    assert server.commits == {}


def test_without_a_network_the_cache_answers_or_one_line_does(server, done, tmp_path, monkeypatch, capsys):
    pushed(server, done)
    expected = load(f"hf://{NAME}").identity
    server.commit("some-one/unseen", {"adapter.safetensors": b""})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load(f"hf://{NAME}").identity == expected
    status, err = one_line(capsys, "pull", "some-one/unseen", "--output", str(tmp_path / "p"))
    assert (status, "offline (HF_HUB_OFFLINE), and the cache does not hold it whole" in err) == (1, True)
    status, err = one_line(capsys, "push", str(done), NAME, "--license", "mit")
    assert (status, "offline (HF_HUB_OFFLINE): nothing can be uploaded" in err) == (1, True)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert load(f"hf://{NAME}").identity == expected
    status, err = one_line(capsys, "pull", "some-one/unseen", "--output", str(tmp_path / "p"))
    assert (status, "http://127.0.0.1:9 cannot be reached" in err) == (1, True)
    status, err = one_line(capsys, "push", str(done), NAME, "--license", "mit")
    assert (status, "http://127.0.0.1:9 cannot be reached" in err) == (1, True)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("fault", "message"), [("cut", "broke off"), ("spoil", "adapter.safetensors arrived damaged (")]
)
def test_a_file_that_arrives_damaged_is_refused_and_the_next_pull_is_whole(
    server, done, tmp_path, capsys, fault, message
):
    pushed(server, done)
    server.fault = fault
    status, err = one_line(capsys, "pull", NAME, "--output", str(tmp_path / "pulled"))
    assert (status, message in err) == (1, True), err
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    server.fault = ""
    hub.pull(hub.Address.of(NAME), tmp_path / "pulled")
    assert (tmp_path / "pulled/adapter.safetensors").read_bytes() == (done / "adapter.safetensors").read_bytes()


def test_a_repository_that_holds_a_damaged_adapter_is_refused(server, done, tmp_path):
    data = (done / "adapter.safetensors").read_bytes()
    for content, message in ((data[:-5], "cut short"), (b"\x80\x04pickle" * 99, "not a safetensors file")):
        server.commit(NAME, {"adapter.safetensors": content, "recipe.yaml": b""})
        with pytest.raises(RequestError, match=message):
            hub.pull(hub.Address.of(NAME), tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_an_adapter_for_another_backbone_is_refused(server, done):
    files = pushed(server, done)
    other = files["recipe.yaml"].replace(b"weights: random", b"weights: random\n  seed: 7")
    server.commit(NAME, {"recipe.yaml": other})
    with pytest.raises(RequestError, match="made for backbone .* with fingerprint .*; this is .* with"):
        load(f"hf://{NAME}")


def test_a_disk_that_refuses_is_told_and_leaves_nothing(server, done, tmp_path, monkeypatch):
    pushed(server, done)

    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub.shutil, "copyfile", full)
    with pytest.raises(WorkError, match="pulled: cannot be written: No space left on device"):
        hub.pull(hub.Address.of(NAME), tmp_path / "pulled")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_pull_killed_half_way_leaves_nothing_and_can_be_repeated(server, done, tmp_path):
    """A process of its own, whose environment alone says where the Hub is; its progress goes to standard error."""
    pushed(server, done)
    server.fault = "stall"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    code = "import sys; from shared.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "pull", NAME, "--output", str(tmp_path / "pulled")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert server.stalled.wait(60)
    finally:
        process.kill()
        process.communicate()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    server.fault = ""
    server.go_on.set()
    done_again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done_again.returncode, done_again.stdout) == (0, f"{tmp_path / 'pulled'}\n"), done_again.stderr
    assert "100%" in done_again.stderr
    assert (tmp_path / "pulled/adapter.safetensors").read_bytes() == (done / "adapter.safetensors").read_bytes()


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RequestError, match=r"the Hub needs huggingface_hub: pip install 'omniadapt\[run\]'"):
        hub.fetch(hub.Address.of(NAME))
