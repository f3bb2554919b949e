"""Black boxes: functions, finished runs, and servers that answer with logits, late, with nonsense or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modalities.images.backbones import BlackBox, endpoint
from modalities.images.backbones.endpoint import Endpoint
from modalities.images.heads import Logits
from shared import cli
from shared.errors import RequestError, WorkError

Reply = Callable[[np.ndarray], tuple[int, bytes]]


def colours(images: np.ndarray) -> np.ndarray:
    """(B, 2) logits that depend on the image's energy in red and blue."""
    return np.square(images).mean((2, 3))[:, ::2]


def good(images: np.ndarray) -> tuple[int, bytes]:
    return 200, json.dumps({"logits": colours(images).tolist()}).encode()


class Server:
    """A local server that posts are counted on; ``reply`` says what it answers."""

    def __init__(self) -> None:
        self.reply: Reply = good
        self.posts = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.posts += 1
                status, answer = outer.reply(np.load(io.BytesIO(body), allow_pickle=False))
                with contextlib.suppress(OSError):  # who asked may be gone
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/logits"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(endpoint, "PAUSE", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    found = Server()
    yield found
    found.stop()


# -- one call ------------------------------------------------------------------------------------------------------


def test_a_server_gets_the_images_and_gives_logits(server):
    image = torch.randn(3, 3, 8, 8)
    box = BlackBox(3, model=server.url, classes=2, image_size=8)
    said = box(image)
    assert np.allclose(said.summary.numpy(), colours(image.numpy()), atol=1e-6)
    assert said.maps == ()
    assert (box.calls, box.images, server.posts) == (1, 3, 1)
    assert not list(box.parameters())


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (
            200,
            b"<html>",
            r"the answer is not JSON \(b'<html>'\); it should be JSON, \{\"logits\": 3 lists of 2",
        ),
        (200, b"", "is not JSON"),
        (200, b"[[0, 1], [0, 1], [0, 1]]", "holds no logits"),
        (200, b'{"logits": [[0, 1], [0, 1]]}', r"holds logits of shape \(2, 2\)"),
        (200, b'{"logits": [[0, 1, 2], [0, 1, 2], [0, 1, 2]]}', r"holds logits of shape \(3, 3\)"),
        (200, b'{"logits": [[0, 1], [0], [0, 1]]}', "no table of numbers"),
        (200, b'{"logits": [[0, 1], ["x", 1], [0, 1]]}', "no table of numbers"),
        (200, b'{"logits": [[0, 1], [null, 1], [0, 1]]}', "not finite"),
        (200, b'{"logits": [[0, 1], [NaN, 1], [0, 1]]}', "not finite"),
        (200, b'{"logits": [[0, 1], [1e39, 1], [0, 1]]}', "not finite"),
        (200, b'{"logits": [[0, 1], [0, 1], [0, 1]]}' + b" " * 5000, "is longer than"),
        (200, b"[" * 1000, "is not JSON"),
        (404, b"", r"the server answers with status 404 \(Not Found\)"),
        (401, b"", r"the server answers with status 401 \(Unauthorized\)"),
    ],
)
def test_nonsense_is_one_clear_line_and_not_asked_for_again(server, status, answer, message):
    server.reply = lambda images: (status, answer)
    with pytest.raises(WorkError, match=message) as caught:
        Endpoint(server.url, 2)(torch.zeros(3, 3, 8, 8))
    assert str(caught.value).startswith(server.url)
    assert "\n" not in str(caught.value)
    assert server.posts == 1


def test_a_trouble_that_passes_is_tried_again_and_told(server, caplog):
    replies = iter([(503, b""), (500, b""), good(np.ones((1, 3, 8, 8), np.float32))])
    server.reply = lambda images: next(replies)
    with caplog.at_level(logging.WARNING, "omniadapt"):
        assert Endpoint(server.url, 2)(torch.ones(1, 3, 8, 8)).tolist() == [[1, 1]]
    assert [record.getMessage().partition("; ")[2] for record in caplog.records] == [
        "try 2 of 3 in 0.001 s", "try 3 of 3 in 0.002 s",
    ]  # fmt: skip
    server.reply = lambda images: (503, b"")
    with pytest.raises(WorkError, match=r"status 503 \(Service Unavailable\) \(tried 2 times\)"):
        Endpoint(server.url, 2, retries=1)(torch.ones(1, 3, 8, 8))
    assert server.posts == 5


def test_a_server_that_does_not_answer_in_time(server):
    wait = threading.Event()
    server.reply = lambda images: (wait.wait(5), good(images))[1]
    with pytest.raises(WorkError, match=r"no answer within 0.1 s \(tried 2 times\)"):
        Endpoint(server.url, 2, timeout=0.1, retries=1)(torch.ones(1, 3, 8, 8))
    wait.set()


def test_a_server_that_is_not_there(server):
    url = server.url
    server.server.server_close()
    with pytest.raises(WorkError, match=r"cannot be reached or broke off .* \(tried 1 times\)"):
        Endpoint(url, 2, retries=0)(torch.ones(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.zeros(2, 3), r"answered with shape \(2, 3\); its logits should be \(2, 2\)"),
        (torch.tensor([[0, float("nan")]] * 2), "answered with logits that are not finite"),
    ],
)
def test_a_function_must_give_logits_too(answer, message):
    with pytest.raises(WorkError, match=message):
        BlackBox(3, model=lambda image: answer, classes=2)(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "http://localhost"}, "state its classes"),
        ({"model": "http://", "classes": 2}, "use a URL"),
        ({"model": "http://localhost", "classes": 2, "retries": -1}, "retries -1"),
        ({"model": "http://localhost", "classes": 2, "timeout": 0.0}, "timeout 0.0"),
        ({"model": "http://localhost", "classes": 2, "mean": [1.0]}, "state one of each for 3 bands"),
        ({"model": "http://localhost", "classes": 2, "mean": [1.0] * 3, "std": [0.0] * 3}, "std above 0"),
        ({"model": "absent/run"}, "absent/run"),
    ],
)
def test_a_wrong_setting_is_one_line(settings, message):
    with pytest.raises(RequestError, match=message):
        BlackBox(3, **settings)


def test_scores_and_classes_must_agree():
    with pytest.raises(RequestError, match="gives 3 class scores, the data have 2 classes"):
        Logits(3, 2)


# -- whole runs ----------------------------------------------------------------------------------------------------

RECIPE = """
task: {type: Classification}
data: {type: GeneratedImages, count: 6, classes: [disc, stripes], side: 32, size: 32, crop: 1, batch_size: 4}
backbone: {type: BlackBox, model: URL, classes: 2, image_size: 32, retries: 1}
method: {type: BlackVIP, encoder: vit_small_patch16_224, encoder_weights: random, image_size: 32, trigger: 8,
         encoder_args: {patch_size: 8, model_args: {depth: 1, embed_dim: 24, num_heads: 3}}}
head: {type: Logits}
optimiser: {type: SPSA, repeats: 1}
trainer: {epochs: 3, device: cpu}
"""


def test_a_server_that_dies_leaves_nothing_half_done_and_the_run_goes_on(server, tmp_path, capsys):
    """Trained through a server; stopped by it; resumed to the same bytes; and predicting fails whole, too."""
    recipe, parts, whole = tmp_path / "remote.yaml", tmp_path / "parts", tmp_path / "whole"
    recipe.write_text(RECIPE.replace("URL", server.url))
    assert cli.main(["run", str(recipe), "--output", str(whole)]) == 0
    asked, server.posts = server.posts, 0

    def dies(images: np.ndarray) -> tuple[int, bytes]:
        return good(images) if server.posts < asked // 2 else (500, b"")

    server.reply = dies
    capsys.readouterr()
    assert cli.main(["run", str(recipe), "--output", str(parts)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        f"omniadapt: {server.url}: the server answers with status 500 (Internal Server Error) (tried 2 times)"
    )
    assert not any((parts / name).exists() for name in ("adapter.safetensors", "metrics.json", "report.html"))
    assert "try 2 of 2" in (parts / "log.txt").read_text()
    server.reply = good
    assert cli.main(["run", str(recipe), "--output", str(parts), "--resume"]) == 0
    assert (parts / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (parts, whole))
    assert ours["test"] == theirs["test"]
    assert ours["cost"]["model_calls"] == theirs["cost"]["model_calls"] > 0
    assert ours["predicted"] is None
    _predicts_whole_or_not_at_all(server, whole, tmp_path, capsys)


def _predicts_whole_or_not_at_all(server: Server, run: Path, folder: Path, capsys) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(folder / "one.png")
    table = folder / "labels.csv"
    server.reply = lambda images: good(images) if len(images) == 2 else (200, b'{"logits": [[NaN, 0]]}')  # proof: two
    assert cli.main(["predict", str(run), str(folder / "one.png"), "-o", str(table)]) == 1
    assert "holds logits that are not finite" in capsys.readouterr().err
    assert not table.exists()
    server.reply = good
    assert cli.main(["predict", str(run), str(folder / "one.png"), "-o", str(table)]) == 0
    header, row = table.read_text().splitlines()
    assert header == "file,label,p/disc,p/stripes"
    assert sum(map(float, row.split(",")[2:])) == pytest.approx(1, abs=1e-4)
