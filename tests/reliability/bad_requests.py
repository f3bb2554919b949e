"""Cases of bad input: where files are, who may read them, and what is asked for."""

from __future__ import annotations

from pathlib import Path

from tests.reliability.spoils import (
    IN_RUN,
    PREDICT,
    RUN,
    Case,
    at,
    both,
    closed,
    deep,
    each,
    empty,
    full,
    other_backbone,
    pipe,
    unspeakable,
    write,
)  # fmt: skip
from tests.reliability.world import locked, loop

DENIED, LOOPED = "cannot be read: Permission denied", "cannot be read: Too many levels"
PLACES = {
    "an empty folder of images": Case(RUN, r"images: holds no raster \(\.tif, ", each("images", Path.unlink)),
    "an empty folder to predict": Case(
        "predict {run} {root}/none -o {out}", r"none: holds no raster \(\.tif, ", at("none", Path.mkdir)
    ),
    "an empty folder to compare on": Case(
        "compare {recipe} --methods probe,lora --output {out}", r"masks: holds no raster", each("masks", Path.unlink)
    ),
    "a folder that is missing": Case(
        "run {recipe} data.images={root}/away --output {out}", r"data\.images: no such file or folder: .*away"
    ),
    "a scene that is missing": Case(PREDICT, r"scene\.tif: no such file", at("scene.tif", Path.unlink)),
    "a recipe that is missing": Case(
        "run {root}/away.yaml --output {out}", r"no recipe '.*away\.yaml': neither a file nor one of the project's"
    ),
    "an adapter that is missing": Case("inspect {root}/away", "away: no such file"),
    "a folder for an adapter": Case("inspect {images}", "images: a folder, not a file"),
    "a pipe for a scene": Case(
        PREDICT, r"scene\.tif: a pipe or device, not a file", at("scene.tif", pipe)
    ),
    "a scene whose name is no text": Case(
        PREDICT, r"bad\\udcff\.tif: the name is not UTF-8; rename it", unspeakable
    ),
    "a map whose name is no text": Case(
        "predict {run} {scene} -o {out}\udcff.tif", r"out\\udcff\.tif: the name is not UTF-8; rename it"
    ),
    "an image that may not be read": Case(RUN, rf"images/b\.tif: {DENIED}", at("images/b.tif", locked)),
    "a mask that may not be read": Case(RUN, rf"masks/b\.tif: {DENIED}", at("masks/b.tif", locked)),
    "subfolders that may not be read": Case(RUN, rf"images/deep: {DENIED}", deep),
    "a scene that may not be read": Case(PREDICT, rf"scene\.tif: {DENIED}", at("scene.tif", locked)),
    "a subfolder to predict that may not be read": Case(
        "predict {run} {images} -o {out}", rf"images/deep: {DENIED}", deep
    ),
    "a recipe that may not be read": Case(RUN, rf"recipe\.yaml: {DENIED}", at("recipe.yaml", locked)),
    "an adapter that may not be read": Case(
        IN_RUN, rf"adapter\.safetensors: {DENIED}", at("run/adapter.safetensors", locked)
    ),
    "weights that may not be read": Case(
        "run {recipe} backbone.weights=pretrained backbone.checkpoint={root}/w.pth --output {out}",
        rf"w\.pth: {DENIED}", both(at("w.pth", empty), at("w.pth", locked)),
    ),
    "a run in a folder that may not be entered": Case(PREDICT, r"run/.*Permission denied", at("run", locked)),
    "a place for maps that may not be written": Case(
        "predict {run} {scene} -o {root}/closed/new/map.tif",
        r"closed/new/map\.tif: cannot be written: Permission denied",
        at("closed", closed), 1,
    ),
    "a place for runs that may not be written": Case(
        "run {recipe} --output {root}/closed/new", r"closed/new: cannot be written: Permission denied",
        at("closed", closed), 1,
    ),
    "a run below a file": Case(
        "run {recipe} --output {scene}/new", r"scene\.tif/new: cannot be written: Not a directory", status=1
    ),
    "an image that links to itself": Case(RUN, rf"images/b\.tif: {LOOPED}", at("images/b.tif", loop)),
    "a scene that links to itself": Case(PREDICT, rf"scene\.tif: {LOOPED}", at("scene.tif", loop)),
    "an adapter that links to itself": Case(
        IN_RUN, rf"adapter\.safetensors: {LOOPED}", at("run/adapter.safetensors", loop)
    ),
    "a recipe that links to itself": Case(
        RUN, r"no recipe '.*recipe\.yaml': neither a file nor", at("recipe.yaml", loop)
    ),
    "a folder that links to itself": Case(
        "run {recipe} data.images={root}/loop --output {out}", r"data\.images: no such file or folder: .*loop",
        at("loop", loop),
    ),
    "an output that links to itself": Case(
        "run {recipe} --output {root}/loop", r"loop: cannot be written: (File exists|Too many levels)",
        at("loop", loop), 1,
    ),
    "a mask that links nowhere": Case(
        RUN, r"masks/b\.tif: a link that leads nowhere", at("masks/b.tif", lambda p: (p.unlink(), p.symlink_to("away")))
    ),
}  # fmt: skip
REQUESTS = {
    "a run where something else lies": Case("run {recipe} --output {images}", "images is not an empty directory$"),
    "a run over a run": Case("run {recipe} --output {run}", "run is not an empty directory; add --resume to go on"),
    "a comparison over a run": Case(
        "compare {recipe} --methods probe --output {run}", "run is not an empty directory; add --resume"
    ),
    "resuming another recipe": Case(
        "run {recipe} method.rank=3 --output {run} --resume",
        r"run cannot go on with another recipe: method\.rank was 2, now 3",
    ),
    "resuming nothing": Case("run {recipe} --output {images} --resume", "nothing to resume: .*images holds no run"),
    "predicting with no run": Case(
        "predict {images} {scene} -o {out}.tif", r"images: it is no run directory: it holds no recipe\.yaml"
    ),
    "predicting with an unfinished run": Case(
        PREDICT, r"run: the run has not finished: it holds no adapter", at("run/adapter.safetensors", Path.unlink)
    ),
    "predicting with another backbone": Case(
        PREDICT, r"adapter\.safetensors: made for backbone .* with fingerprint",
        at("run/recipe.yaml", other_backbone),
    ),
    "predicting over the input": Case(
        "predict {run} {scene} -o {scene}", r"scene\.tif: the result would overwrite its own input"
    ),
    "predicting over another file": Case(
        "predict {run} {scene} -o {images}/a.tif", r"images/a\.tif exists and is another prediction or none"
    ),
    "several rasters into one file": Case(
        "predict {run} {images} -o {out}.tif", r"out\.tif: several rasters are written to a folder; name one"
    ),
    "polygons of a raster without a place": Case(
        "predict {run} {scene} -o {out}.geojson", r"scene\.tif: no coordinate reference system",
        write("scene.tif", full(3, "uint8"), georeference=None),
    ),
    "a window that does not fit the model": Case(PREDICT + " --window 40", r"40.* no multiple of its patch of 16"),
    "a window of nothing": Case(PREDICT + " --window 0", "window 0 with overlap 0: at least 1 pixel"),
    "a window that is no number": Case(PREDICT + " --window wide", "argument --window: invalid int value: 'wide'"),
    "an unknown setting": Case(
        "run {recipe} optimiser.learning_rat=1 --output {out}",
        r"optimiser\.learning_rat: Optimiser has no such setting.*learning_rate",
    ),
    "a learning rate of NaN": Case(
        "run {recipe} optimiser.learning_rate=.nan --output {out}", r"optimiser\.learning_rate: wants float, got nan"
    ),
    "an unknown method": Case("compare {recipe} --methods lorra --output {out}", "lorra"),
    "a method twice": Case("compare {recipe} --methods lora,lora --output {out}", "LoRA is named twice"),
    "more scenes to test than there are": Case(
        "run {recipe} data.test=[z] --output {out}", "test names 'z', which is no scene; nearest: 'a'"
    ),
}  # fmt: skip
