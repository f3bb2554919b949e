"""Predictions cut off at any moment: resumed, they end as if uninterrupted, bit for bit; failed, they leave nothing."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared.errors import RequestError, WorkError
from shared.mapping import map_raster
from shared.mapping.partial import partial
from shared.mapping.windows import grid
from tests.shared.mapping.conftest import opened

OPTIONS = {"window": 24, "overlap": 8, "batch": 4}


def child(work: Callable[[], None]) -> int:
    """Start ``work`` in a process of its own; its exit status is 0, 3 for a WorkError, 4 for anything else."""
    if pid := os.fork():
        return pid
    status = 4
    try:
        work()
        status = 0
    except WorkError:
        status = 3
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    """The exit status of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("output", ["classes", "probabilities", "polygons"])
def test_killed_at_every_step_and_resumed_it_ends_as_if_uninterrupted(tmp_path, made, scores, feed, output):
    source, suffix = made(70, 90), ".geojson" if output == "polygons" else ".tif"
    map_raster(scores, source, tmp_path / f"whole{suffix}", feed, output=output, **OPTIONS)
    target, kills = tmp_path / f"killed{suffix}", 0

    def killed(after: int) -> Callable[[], None]:
        calls = iter(range(after, -1, -1))

        def tick(*_: object) -> None:
            if not next(calls):
                os.kill(os.getpid(), signal.SIGKILL)

        return lambda: map_raster(scores, source, target, feed, output=output, tick=tick, **OPTIONS) and None

    for after in (2, 1, 3, 0, 2, 4, 5, 6):
        if (status := ended(child(killed(after)))) == 0:
            break
        assert status == -signal.SIGKILL
        assert not target.exists()
        kills += 1
    resumed = map_raster(scores, source, target, feed, output=output, **OPTIONS)
    assert kills >= 4
    assert resumed.resumed or status == 0
    same(tmp_path / f"whole{suffix}", target)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({source.name, f"whole{suffix}", target.name})


def same(one: Path, other: Path) -> None:
    if one.suffix == ".tif":
        a, b = opened(one)[0], opened(other)[0]
        assert a.tobytes() == b.tobytes()
    else:
        assert json.loads(one.read_text()) == json.loads(other.read_text())


def test_killed_at_random_moments(tmp_path, made, scores, feed):
    source, chance, kills = made(150, 120), random.Random(1), 0
    start = time.perf_counter()
    map_raster(scores, source, tmp_path / "whole.tif", feed, output="probabilities", **OPTIONS)
    whole = time.perf_counter() - start
    for target in (tmp_path / "first.tif", tmp_path / "second.tif", tmp_path / "third.tif"):

        def work(target: Path = target) -> None:
            map_raster(scores, source, target, feed, output="probabilities", **OPTIONS)

        for _ in range(25):
            pid = child(work)
            time.sleep(chance.uniform(0, whole / 2))
            os.kill(pid, signal.SIGKILL)
            kills += ended(pid) == -signal.SIGKILL
            if target.exists():
                break
        work()
        same(tmp_path / "whole.tif", target)
    assert kills >= 3
    names = ["first.tif", "in.tif", "second.tif", "third.tif", "whole.tif"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_half_a_strip_is_cut_off(tmp_path, made, scores, feed):
    source, target = made(70, 90), tmp_path / "c.tif"
    map_raster(scores, source, tmp_path / "whole.tif", feed, **OPTIONS)

    def stop(stage: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        map_raster(scores, source, target, feed, tick=stop, **OPTIONS)
    strips = tmp_path / ".c.tif.partial" / "strips"
    for cut in (1, 16 * 90, 16 * 90 + 7):
        os.truncate(strips, strips.stat().st_size - cut)
        with pytest.raises(KeyboardInterrupt):
            map_raster(scores, source, target, feed, tick=stop, **OPTIONS)
    with open(strips, "ab") as file:
        file.write(b"\7" * 100)
    found = map_raster(scores, source, target, feed, **OPTIONS)
    assert found.resumed
    same(tmp_path / "whole.tif", target)


def test_only_a_prediction_of_the_same_settings_goes_on(tmp_path, made, scores, feed):
    source, target = made(70, 90), tmp_path / "c.tif"

    def interrupt(**options) -> None:
        def stop(stage: str, done: int, total: int) -> None:
            if done > total // 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            map_raster(scores, source, target, feed, tick=stop, **options)

    interrupt(**OPTIONS)
    assert not map_raster(scores, source, target, feed, **{**OPTIONS, "overlap": 6}).resumed
    target.unlink()
    interrupt(**OPTIONS)
    assert not map_raster(scores, source, target, feed, identity={"adapter": "another"}, **OPTIONS).resumed
    target.unlink()
    interrupt(**OPTIONS)
    os.utime(source, ns=(0, 0))  # the raster has changed, for all that can be known
    assert not map_raster(scores, source, target, feed, **OPTIONS).resumed
    target.unlink()
    interrupt(**OPTIONS)
    assert map_raster(scores, source, target, feed, **OPTIONS).resumed


@pytest.mark.parametrize(("output", "room"), [("classes", 3000), ("probabilities", 60_000), ("probabilities", 200_000)])
def test_a_full_disk_leaves_nothing(tmp_path, made, scores, feed, output, room, capfd):
    source, target = made(150, 120), tmp_path / "c.tif"  # 18 or 216 kB of strips, and a map of more than 200

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        try:
            map_raster(scores, source, target, feed, output=output, **OPTIONS)
        except WorkError as error:
            print("said:", error, flush=True)
            raise

    assert ended(child(work)) == 3
    assert f"said: {target}: cannot be written: File too large" in capfd.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.tif"]


def test_two_processes_at_one_target(tmp_path, made, scores, feed):
    source, target = made(40, 40), tmp_path / "c.tif"
    with (
        partial(target, {}, grid(40, 40, 24, 8, 10**6), 1, "uint8"),
        pytest.raises(RequestError, match="another process"),
    ):
        map_raster(scores, source, target, feed)
    map_raster(scores, source, target, feed)
    assert np.isin(opened(target)[0], [0, 1, 2, 255]).all()
