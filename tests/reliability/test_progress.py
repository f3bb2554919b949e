"""The progress bar of a prediction, seen on a true terminal: what is done, how much of it, and the time left."""

from __future__ import annotations

import os
import pty
import re
import struct
import time

import pytest

from modalities.remote_sensing.segmentation import Segmentation
from shared.rasters import write_raster
from tests.reliability.world import HERE, World, image


def on_terminal(world: World, command: str, pause: float) -> tuple[int, str]:
    """The exit status of a command on a terminal of 100 columns, and all that it wrote there; every call of the model
    takes ``pause`` seconds more."""
    import fcntl
    import termios

    child, terminal = pty.fork()
    if not child:
        status = 9
        try:
            fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
            os.environ["TERM"] = "xterm"
            for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
                setattr(__import__("sys"), name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
            scores = Segmentation.scores
            Segmentation.scores = lambda task, images: (time.sleep(pause), scores(task, images))[1]
            status = world.main(command)
        finally:
            os._exit(status)
    shown = b""
    while True:
        try:
            if not (some := os.read(terminal, 65536)):
                break
        except OSError:  # what a closed terminal gives
            break
        shown += some
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), shown.decode()


@pytest.fixture
def scene(world) -> World:
    write_raster(world.scene, image(150, 150, "large"), georeference=HERE)
    return world


def test_a_terminal_shows_what_is_done_and_the_time_left(scene):
    status, shown = on_terminal(scene, "predict {run} {scene} {images}/a.tif -o {out} --window 32", 0.12)
    assert status == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "1/2 scene.tif: predicting" in plain
    assert "2/2 a.tif" in plain
    first = plain[: plain.index("2/2 a.tif")]
    bars = re.findall(r"predicting\s+\S+\s+(\d+)%\s+(-:--:--|\d:\d\d:\d\d)", first)
    shares = [int(share) for share, _ in bars]
    left = [int(hours) * 3600 + int(minutes) * 60 + int(seconds) for _, text in bars if text[0] != "-"
            for hours, minutes, seconds in [text.split(":")]]  # fmt: skip
    assert shares == sorted(shares)
    assert len(set(shares)) >= 4
    assert shares[0] < 20
    assert shares[-1] >= 80
    assert left, "a time was never told"
    assert left[0] > left[-1] or max(left) <= 2  # seconds, and they run down
    assert left[-1] <= 1
    assert f"{scene.out / 'scene.tif'}: 150 x 150 pixels: " in plain.replace("\r\n", "")


def test_where_there_is_no_terminal_no_bar_is_drawn(scene, capfd):
    assert scene.main("predict {run} {scene} -o {out} --window 32") == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert len(out.splitlines()) == 1
