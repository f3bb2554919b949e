"""Cases of bad input: what Segment Anything is asked about, of which image, and where the answer goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.reliability.spoils import Case, Spoil, at, both, empty, full, write
from tests.reliability.world import World, truncated

ASK = "predict {run} {scene} -o {out}.tif --prompts {root}/asked.json"
ALL = "predict {run} {scene} -o {out}.tif"
SHADOW = "predict {shadow} {photograph} -o {out}.png"
WHERE = r"lies outside the image, 44 pixels wide and 40 high"


def asking(text: str, name: str = "asked.json") -> Spoil:
    return lambda w: (w.root / name).write_text(text)


def grey(name: str, height: int, width: int, value: int = 255) -> Spoil:
    return lambda w: Image.fromarray(np.full((height, width), value, np.uint8)).save(w.root / name)


def as_photograph(change: Callable[[Path], Any]) -> Spoil:
    def spoil(w: World) -> None:
        change(w.photograph)  # type: ignore[attr-defined]

    return spoil


MASK = '[{"mask": "rough.png"}]'
PROMPTS = {
    "a point right of the image": Case(
        ASK, rf"asked\.json: object 1: point \(45, 3\) {WHERE}", asking('[{"points": [[45, 3]]}]')
    ),
    "a point above the image": Case(
        ASK, rf"object 2: point \(3, -1\) {WHERE}", asking('[{"box": [1, 1, 5, 5]}, {"points": [[3, -1]]}]')
    ),
    "a point that is no number": Case(
        ASK, r"object 1: points \[\[nan, 3\]\]: wants 2 numbers", asking('[{"points": [[NaN, 3]]}]')
    ),
    "a point in three dimensions": Case(
        ASK, r"object 1: points .*: wants 2 numbers", asking('[{"points": [[1, 2, 3]]}]')
    ),
    "a box that leaves the image": Case(
        ASK, rf"object 1: box corner \(20, 41\) {WHERE}", asking('[{"box": [1, 1, 20, 41]}]')
    ),
    "a box that ends before it begins": Case(ASK, r"object 1: box .* is empty", asking('[{"box": [9, 1, 2, 8]}]')),
    "a label that is none": Case(
        ASK, r"object 1: labels \[2\]: one for each", asking('[{"points": [[1, 1]], "labels": [2]}]')
    ),
    "too few labels": Case(
        ASK, r"object 1: labels \[1\]: one for each of its 2 points",
        asking('[{"points": [[1, 1], [2, 2]], "labels": [1]}]')
    ),
    "an object without a prompt": Case(
        ASK, r"object 1: neither points nor a box nor a mask", asking('[{"name": "roof"}]')
    ),
    "an unknown key": Case(ASK, r"object 1: wants points and labels, box, mask", asking('[{"boxes": [1, 1, 2, 2]}]')),
    "no object": Case(ASK, r"asked\.json: asks about no object", asking("[]")),
    "no list": Case(ASK, r"asked\.json: wants a list of objects", asking("3")),
    "no JSON": Case(ASK, r"asked\.json: not a readable JSON file", asking("points: 3")),
    "prompts of zero bytes": Case(ASK, r"asked\.json: not a readable JSON file", at("asked.json", empty)),
    "prompts that are missing": Case(ASK, r"asked\.json: no such file or folder of prompts"),
    "a folder without the image's prompts": Case(
        "predict {run} {scene} -o {out}.tif --prompts {images}",
        r"scene\.tif: no prompts: .*images/scene\.json or \.csv is missing"
    ),
    "a table without columns": Case(
        "predict {run} {scene} -o {out}.tif --prompts {root}/asked.csv", r"asked\.csv: wants the columns",
        asking("1,2\n", "asked.csv")
    ),
    "a table that leaves the image": Case(
        "predict {run} {scene} -o {out}.tif --prompts {root}/asked.csv",
        rf"asked\.csv: object 2: point \(44.5, 3\) {WHERE}", asking("x,y\n1,2\n44.5,3\n", "asked.csv")
    ),
    "bad prompts beside the image": Case(
        ALL, rf"scene\.prompts\.csv: object 1: point \(50, 3\) {WHERE}", asking("x,y\n50,3\n", "scene.prompts.csv")
    ),
    "two files of prompts beside the image": Case(
        ALL, r"scene\.prompts\.json and scene\.prompts\.csv both hold prompts",
        both(asking("[]", "scene.prompts.json"), asking("x,y\n1,3\n", "scene.prompts.csv"))
    ),
    "a mask of another extent": Case(
        ASK, r"object 1: mask .*rough\.png: 44 x 40 pixels, its image 40 x 44; a mask has its image's size",
        both(grey("rough.png", 44, 40), asking(MASK))
    ),
    "a mask that shows nothing": Case(
        ASK, r"object 1: mask .*rough\.png is empty", both(grey("rough.png", 40, 44, 0), asking(MASK))
    ),
    "a mask that is missing": Case(ASK, r"object 1: mask .*rough\.png: no such file", asking(MASK)),
    "a mask of zero bytes": Case(
        ASK, r"object 1: mask .*rough\.png: .*the file is empty", both(at("rough.png", empty), asking(MASK))
    ),
    "a mask cut short": Case(
        ASK, r"object 1: mask .*rough\.png: not a readable PNG",
        both(grey("rough.png", 40, 44), at("rough.png", truncated), asking(MASK))
    ),
    "one file of prompts for several images": Case(
        "predict {run} {images} -o {out} --prompts {root}/asked.json",
        "several images have a file of prompts each; name their folder", asking('[{"points": [[1, 1]]}]')
    ),
    "prompts and a generator": Case(
        f"{ASK} --generator points_per_side=4", "give one of them", asking('[{"points": [[1, 1]]}]')
    ),
    "a setting that is none": Case(f"{ALL} --generator points=4", "--generator points: no such setting"),
    "a setting without a number": Case(
        f"{ALL} --generator points_per_side=many", "'points_per_side=many': wants key=value"
    ),
    "no points at all": Case(f"{ALL} --generator points_per_side=0", "points_per_side=0: use a whole number from 1"),
    "a scene cut short": Case(ALL, r"scene\.tif: damaged, or not GTiff", at("scene.tif", truncated)),
    "a scene of zero bytes": Case(ALL, r"scene\.tif: empty \(0 bytes\)", at("scene.tif", empty)),
    "a scene of four bands": Case(
        ALL, r"scene\.tif: 4 bands; the model was trained on files of 3 bands",
        write("scene.tif", full(9, "uint8", (4, 40, 44)))
    ),
    "a scene without a valid pixel": Case(ALL, r"scene\.tif: no valid pixel", write("scene.tif", full(np.nan))),
    "outlines of a scene that lies nowhere": Case(
        "predict {run} {scene} -o {out}.geojson", r"out\.geojson: the image has no coordinate reference system",
        write("scene.tif", full(9, "uint8"), georeference=None)
    ),
    "a PNG of a scene on Earth": Case(
        "predict {run} {scene} -o {out}.png", r"out\.png: the image lies on Earth, which PNG cannot say"
    ),
    "probabilities of objects": Case(
        f"{ALL} --as probabilities", "--as probabilities: objects are written as classes"
    ),
    "objects over their own image": Case(
        "predict {run} {scene} -o {scene} --overwrite", "a result would overwrite an input"
    ),
    "objects where something is": Case(
        ALL, r"out\.tif exists already; --overwrite replaces it", asking("x", "out.tif")
    ),
    "a window that is no multiple": Case(f"{ALL} --window 50", "is no multiple of its patch of 8"),
    "prompts for shadows": Case(f"{SHADOW} --prompts {{root}}/asked.json", "answers no prompts", asking("[]")),
    "a photograph cut short": Case(SHADOW, r"photograph\.png: not a readable PNG", as_photograph(truncated)),
    "a photograph of zero bytes": Case(
        SHADOW, r"photograph\.png: not a readable image: the file is empty", as_photograph(empty)
    ),
    "a photograph that is missing": Case(SHADOW, r"photograph\.png: no such file", as_photograph(Path.unlink)),
    "a grey photograph": Case(SHADOW, r"photograph\.png: channels 1 \(L\), wanted 3", grey("photograph.png", 20, 30)),
    "shadows where something is": Case(SHADOW, r"out\.png exists already", asking("x", "out.png")),
    "shadows in a window": Case(f"{SHADOW} --window 32", "trained on whole images and has no --window"),
    "several photographs for one mask": Case(
        "predict {shadow} {photograph} {root}/other.png -o {out}.png", "several images are written to a folder"
    ),
}  # fmt: skip
