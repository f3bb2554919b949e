"""Good work that is stopped: by a full disk, by Ctrl-C at a write, by another process in the same directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shared.store import read_header
from tests.reliability.world import interrupting, opened, small_disk, small_files

RUN_FILES = {
    "recipe.yaml",
    "adapter.safetensors",
    "metrics.json",
    "metrics.csv",
    "checkpoints",
    "log.txt",
    "report.html",
}
KINDS = {"classes": ".tif", "probabilities": ".tif", "polygons": ".geojson"}


def one_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What stderr holds: one line of ours, with these words."""
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1, said
    assert said.startswith("omniadapt: ")
    assert "Traceback" not in said
    assert "--debug" not in said
    for word in words:
        assert word in said
    return said


def whole(folder: Path) -> None:
    """What lies in a run directory is a part of a run, each file whole, and nothing else."""
    assert {path.name for path in folder.iterdir()} <= RUN_FILES
    for path in (folder / "checkpoints").glob("*"):
        assert path.name in ("last.ckpt", "best.ckpt")
    if (folder / "adapter.safetensors").exists():
        read_header(folder / "adapter.safetensors")
    if (folder / "metrics.json").exists():
        json.loads((folder / "metrics.json").read_text())
    if (folder / "metrics.csv").exists():
        lines = (folder / "metrics.csv").read_text().splitlines()
        assert len({line.count(",") for line in lines}) <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", [4096, 8192])
def test_a_disk_that_is_full_before_a_map_is_done(world, kind, room, capsys):
    with small_disk(world.root / "disk", room):
        target = world.root / "disk" / "new" / f"map{KINDS[kind]}"
        assert world.main(f"predict {{run}} {{scene}} -o {target} --as {kind}") == 1
        said = one_line(capsys, f"map{KINDS[kind]}")
        assert "cannot be written: No space left on device" in said or "is the disk full?" in said
        assert list((world.root / "disk").iterdir()) == []


@pytest.mark.parametrize("room", [4096, 12288, 40960, 61440, 90112, 131072])
def test_a_disk_that_is_full_before_a_run_is_done(world, room, capsys):
    """These stop it from the first file to the last: log, metrics, checkpoints, adapter, page."""
    with small_disk(world.root / "disk", room):
        assert world.main("run {recipe} --output {root}/disk/run") == 1
        one_line(capsys, str(world.root / "disk" / "run"), "No space left on device")
        if (world.root / "disk" / "run").exists():
            whole(world.root / "disk" / "run")
            assert not (world.root / "disk" / "run" / "report.html").exists()


@pytest.mark.parametrize("room", [100, 1000, 5000, 20000])
def test_files_that_may_not_grow(world, room, capsys):
    """Stands in for a full disk where none can be mounted: the system refuses larger files."""
    with small_files(room):
        assert world.main("run {recipe} --output {out}") == 1
    one_line(capsys, str(world.out), "File too large")
    if world.out.exists():
        whole(world.out)
        assert not (world.out / "report.html").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_maps_that_may_not_grow(world, kind, capsys):
    before = world.content()
    with small_files(600):
        assert world.main(f"predict {{run}} {{scene}} -o {{root}}/new/map{KINDS[kind]} --as {kind}") == 1
    one_line(capsys, f"map{KINDS[kind]}", "cannot be written: File too large")
    assert world.content() == before


def test_a_run_on_a_disk_with_room_again_ends_as_if_it_had_never_been_full(world, trained, capsys):
    with small_disk(world.root / "disk", 61440):
        folder = world.root / "disk" / "run"
        assert world.main(f"run {{recipe}} --output {folder}") == 1
        subprocess.run(["mount", "-o", "remount,size=8m", str(world.root / "disk")], check=True)
        assert world.main(f"run {{recipe}} --output {folder} --resume") == 0
        assert {path.name for path in folder.iterdir()} == RUN_FILES
        scores = [json.loads((run / "metrics.json").read_text())["test"] for run in (folder, trained)]
        assert scores[0] == scores[1]
    capsys.readouterr()


@pytest.mark.parametrize(
    "name", ["recipe.yaml", "metrics.csv", "best.ckpt", "last.ckpt", "adapter.safetensors", "report.html"]
)
def test_ctrl_c_while_a_file_of_a_run_is_written(world, name, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupting(os.replace, name))
        assert world.main("run {recipe} --output {out}") == 130
    one_line(capsys, "interrupted")
    assert not (world.out / name).exists()
    if world.out.exists():
        assert {path.name for path in world.out.iterdir()} <= RUN_FILES


def test_ctrl_c_while_a_map_is_written(world, capsys, monkeypatch):
    """The part that is done stays beside the target, hidden, and the next prediction ends as if uninterrupted."""
    assert world.main("predict {run} {scene} -o {root}/right.tif") == 0
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupting(os.replace, "map.tif"))
        capsys.readouterr()
        assert world.main("predict {run} {scene} -o {root}/map.tif") == 130
    one_line(capsys, "interrupted")
    assert not (world.root / "map.tif").exists()
    assert (world.root / ".map.tif.partial").is_dir()
    assert world.main("predict {run} {scene} -o {root}/map.tif") == 0
    assert capsys.readouterr().out.endswith("; carried on from where it was cut off\n")
    assert not (world.root / ".map.tif.partial").exists()
    np.testing.assert_array_equal(opened(world.root / "map.tif")[0], opened(world.root / "right.tif")[0])


PAIRS = """
import os, sys, time
from pathlib import Path
import modalities.images.backbones.timm_vit, modalities.remote_sensing.segmentation, rasterio, timm, torch, yaml
from shared import cli, compare, run
from shared.training import engine
torch.set_num_threads(1)
look = run.directory

def together(number, command, count):
    def directory(*arguments, **options):  # both have looked, and found it empty, before either goes on
        found = look(*arguments, **options)
        Path(f"ready{count}{number}").touch()
        while len(list(Path().glob(f"ready{count}*"))) < 2:
            time.sleep(0.01)
        return found
    run.directory = directory
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}{count}{number}", os.O_WRONLY | os.O_CREAT), stream)
    Path(f"status{count}{number}").write_text(str(cli.main(command)))

for count, command in enumerate((sys.argv[1:5], sys.argv[5:])):
    children = []
    for number in range(2):
        if not (child := os.fork()):
            try:
                together(number, command, count)
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
"""


def test_two_processes_into_one_directory(world):
    """One does its work as if alone; the other is told, and changes nothing. For run and for compare."""
    compared = world.root / "compared"
    commands = ["run {recipe} --output {out}", f"compare {{recipe}} --output {compared} --methods probe"]
    words = [word for command in commands for word in world.words(command)]
    subprocess.run([sys.executable, "-c", PAIRS, *words], cwd=world.root, check=True, timeout=180)
    for count, (folder, run) in enumerate(((world.out, world.out), (compared, compared / "Probe" / "seed_0"))):
        statuses = [(world.root / f"status{count}{number}").read_text() for number in range(2)]
        said = [(world.root / f"err{count}{number}").read_text() for number in range(2)]
        assert sorted(statuses) == ["0", "2"], said
        assert said[statuses.index("0")] == ""
        assert said[statuses.index("2")].startswith(f"omniadapt: {folder}: another process ")
        assert len(said[statuses.index("2")].splitlines()) == 1
        assert {path.name for path in run.iterdir()} == RUN_FILES
        assert (run / "log.txt").read_text().count("recipe recipe") == 1
    assert {path.name for path in compared.iterdir()} == {"Probe", "compare.json", "report.html"}


def test_the_second_of_two_runs_that_resume_one(world, capsys):
    """While a process holds the directory, and not after its end."""
    words = [sys.executable, "-c", HOLD, str(world.run)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = world.content()
        assert world.main("run {recipe} --output {run} --resume") == 2
        hint = "choose another directory, or wait until it has ended"
        one_line(capsys, f"{world.run}: another process is writing it; {hint}")
        assert world.content() == before
        holder.kill()
    assert (world.run / ".claim").exists()
    assert world.main("run {recipe} --output {run} --resume") == 0
    assert not (world.run / ".claim").exists()


HOLD = """
import sys
from pathlib import Path
from shared.claim import claimed
with claimed(Path(sys.argv[1]), fresh=False):
    print("held", flush=True)
    sys.stdin.read()
"""
