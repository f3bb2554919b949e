"""Cases of bad input: what files hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from shared.rasters import write_raster
from tests.reliability.spoils import (
    IN_RUN,
    PREDICT,
    RUN,
    Case,
    arrays,
    at,
    both,
    checkpoint,
    each,
    empty,
    full,
    header,
    one_label,
    palette,
    picture,
    unvarying,
    write,
)  # fmt: skip
from tests.reliability.world import HERE, truncated

MESSY = {
    "an image without its mask": Case(
        RUN, r"image .*images/b\.tif has no mask: .*masks/b\.\* is missing", at("masks/b.tif", Path.unlink)
    ),
    "two images without masks": Case(
        RUN, r"images/b\.tif \(and 1 more\) has no mask",
        both(at("masks/b.tif", Path.unlink), at("masks/d.tif", Path.unlink)),
    ),
    "a mask without its image": Case(
        RUN, r"mask .*masks/c\.tif has no image: .*images/c\.\* is missing", at("images/c.tif", Path.unlink)
    ),
    "masks where the images are": Case(
        "run {recipe} data.masks={images} --output {out}", "images and masks are the same folder, .*images"
    ),
    "two images of one name": Case(
        RUN, r"images/b\.(png|tif) and b\.(png|tif) share one name; keep one of them",
        both(write("x.tif", full(3, "uint8")), picture("x.tif", ".png", lambda p: p.rename(p.parent / "images/b.png"))),
    ),
    "a mask smaller than its image": Case(
        RUN, r"masks/b\.tif: 16 x 32 pixels, its image 32 x 32; a mask has its image's size",
        write("masks/b.tif", full(1, "uint8", (1, 16, 32))),
    ),
    "images of two sizes": Case(
        RUN, r"images differ in size \(\(32, 32\) and \(40, 44\) pixels\), so state the size of a tile",
        both(write("images/b.tif", full(3, "uint8")), write("masks/b.tif", full(1, "uint8", (1, 40, 44)))),
    ),
    "a mask that lies elsewhere": Case(
        RUN, r"masks/b\.tif: lies elsewhere than its image .*images/b\.tif; reproject it",
        write("masks/b.tif", full(1, "uint8", (1, 32, 32)),
              georeference=replace(HERE, crs="EPSG:32633")),
    ),
    "a label out of range": Case(
        RUN, r"masks/b\.tif: values \[7\] stand for no class; .* have \[0, 1, 2\]",
        write("masks/b.tif", one_label(7, "uint8")),
    ),
    "a label below 0": Case(
        RUN, r"masks/b\.tif: values \[-1\] stand for no class", write("masks/b.tif", one_label(-1, "int16"))
    ),
    "a label with a fraction": Case(
        RUN, r"masks/b\.tif: a mask holds whole class values, this file holds 1\.5",
        write("masks/b.tif", one_label(1.5, "float32")),
    ),
    "an infinite label": Case(
        RUN, r"masks/b\.tif: .*inf", write("masks/b.tif", one_label(np.inf, "float32"))
    ),
    "no label at all": Case(
        "run {recipe} data.ignore_value=9 --output {out}", "no pixel of the train split has a label",
        each("masks", lambda p: write_raster(p, full(9, "uint8", (1, 32, 32))(), georeference=HERE)),
    ),
    "an image all nodata": Case(
        RUN, r"images/b\.tif: no valid pixel \(all NaN, nodata or transparent\)",
        write("images/b.tif", full(0, "uint8", (3, 32, 32)), nodata=0),
    ),
    "an image all NaN": Case(
        RUN, r"images/b\.tif: no valid pixel", write("images/b.tif", full(np.nan, shape=(3, 32, 32)))
    ),
    "an image all infinite": Case(
        RUN, r"images/b\.tif: no valid pixel", write("images/b.tif", full(-np.inf, shape=(3, 32, 32)))
    ),
    "a scene all nodata": Case(PREDICT, r"scene\.tif: no valid pixel", write("scene.tif", full(7, "uint8"), nodata=7)),
    "a scene all NaN": Case(PREDICT, r"scene\.tif: no valid pixel", write("scene.tif", full(np.nan))),
    "a scene all infinite": Case(PREDICT, r"scene\.tif: no valid pixel", write("scene.tif", full(np.inf))),
    "a band that never varies": Case(
        RUN, "band '(band 1|red)' is 5 on every training pixel; leave it out of bands",
        each("images", unvarying),
    ),
}  # fmt: skip
DAMAGED = {
    "a truncated TIFF to train on": Case(RUN, r"images/b\.tif: damaged, or not GTiff", at("images/b.tif", truncated)),
    "a truncated TIFF mask": Case(RUN, r"masks/b\.tif: damaged \(.*tag ignored\)", at("masks/b.tif", truncated)),
    "a truncated PNG to train on": Case(
        RUN, r"images/b\.png: damaged, or not PNG", picture("images/b.tif", ".png", truncated)
    ),
    "a truncated PNG mask": Case(RUN, r"masks/b\.png: damaged, or not PNG", picture("masks/b.tif", ".png", truncated)),
    "a truncated TIFF to predict": Case(PREDICT, r"scene\.tif: damaged, or not GTiff", at("scene.tif", truncated)),
    "a truncated PNG to predict": Case(
        PREDICT, r"scene\.png: damaged, or not PNG", picture("scene.tif", ".png", truncated)
    ),
    "a truncated JPEG to predict": Case(
        PREDICT, r"scene\.jpg: damaged, or not JPEG", picture("scene.tif", ".jpg", truncated)
    ),
    "a truncated .npy": Case(
        PREDICT, r"scene\.npy: damaged, or not a plain \.npy array",
        both(lambda w: arrays(w, 3, 40, 44), at("scene.npy", truncated)),
    ),
    "a text called .tif": Case(
        PREDICT, r"scene\.tif: damaged, or not GTiff", at("scene.tif", lambda p: p.write_text("hello"))
    ),
    "an unknown kind": Case(
        "predict {run} {recipe} -o {out}.tif", r"recipe\.yaml: not a raster this reads; use \.tif"
    ),
    "an image of zero bytes": Case(RUN, r"images/b\.tif: empty \(0 bytes\)", at("images/b.tif", empty)),
    "a mask of zero bytes": Case(RUN, r"masks/b\.tif: empty \(0 bytes\)", at("masks/b.tif", empty)),
    "a scene of zero bytes": Case(PREDICT, r"scene\.tif: empty \(0 bytes\)", at("scene.tif", empty)),
    "a recipe of zero bytes": Case(RUN, r"recipe\.yaml: a recipe is a mapping of sections", at("recipe.yaml", empty)),
    "an adapter of zero bytes": Case(
        IN_RUN, r"adapter\.safetensors: cut short or not a safetensors file \(0 bytes\)",
        at("run/adapter.safetensors", empty),
    ),
    "weights of zero bytes": Case(
        "run {recipe} backbone.weights=pretrained backbone.checkpoint={root}/w.pth --output {out}",
        r"w\.pth: it cannot be read as plain tensors", at("w.pth", empty),
    ),
    "a run with an adapter of zero bytes": Case(
        PREDICT, r"run/adapter\.safetensors: cut short", at("run/adapter.safetensors", empty)
    ),
    "an adapter cut short": Case(
        IN_RUN, r"adapter\.safetensors: cut short: \d+ bytes where its header promises \d+",
        at("run/adapter.safetensors", truncated),
    ),
    "an adapter of noise": Case(
        IN_RUN, r"adapter\.safetensors: cut short or not a safetensors file",
        at("run/adapter.safetensors", lambda p: p.write_bytes(bytes(range(256)))),
    ),
    "an adapter with a header of noise": Case(
        IN_RUN, r"adapter\.safetensors: not a safetensors file \(its header does not parse\)",
        at("run/adapter.safetensors", header(b"[1, 2]")),
    ),
    "an adapter nested without end": Case(
        IN_RUN, r"adapter\.safetensors: not a safetensors file \(its header does not parse\)",
        at("run/adapter.safetensors", header(b"[" * 100_000)),
    ),
    "weights of someone else": Case(
        IN_RUN, r"adapter\.safetensors: a safetensors file, but not an omniadapt adapter",
        at("run/adapter.safetensors", header(b"{}")),
    ),
    "an adapter that lacks its method": Case(
        IN_RUN, r"adapter\.safetensors: its header lacks 'method'",
        at("run/adapter.safetensors", header(json.dumps({"__metadata__": {"omniadapt": '{"format": 1}'}}).encode())),
    ),
    "a checkpoint cut short": Case(
        "run {recipe} --output {run} --resume", r"last\.ckpt: not a readable checkpoint",
        checkpoint(b"PK\3\4 and no more"),
    ),
    "a checkpoint of zero bytes": Case(
        "run {recipe} --output {run} --resume", r"last\.ckpt: not a readable checkpoint", checkpoint(b"")
    ),
    "a recipe that is no YAML": Case(
        RUN, r"recipe\.yaml: bad YAML at line 1, column", at("recipe.yaml", lambda p: p.write_text("a: [1, 2"))
    ),
    "a recipe that is no text": Case(
        RUN, r"recipe\.yaml: not a YAML text", at("recipe.yaml", lambda p: p.write_bytes(b"\xff\xfe\x00\x01"))
    ),
}  # fmt: skip
BANDS = {
    "an image of four bands": Case(
        RUN, r"images/b\.tif: 4 bands, but a\.tif has 3", write("images/b.tif", full(3, "uint8", (4, 32, 32)))
    ),
    "a mask of three bands": Case(
        RUN, r"masks/b\.tif: a mask has one band of class values, this file has 3 that differ",
        write("masks/b.tif", lambda: np.arange(3, dtype="uint8")[:, None, None].repeat(32, 1).repeat(32, 2)),
    ),
    "a band that is not there": Case(
        "run {recipe} data.bands=[1,9] --output {out}", r"images/a\.tif: no band 9; it has 1 "
    ),
    "a scene of one band": Case(
        PREDICT, r"scene\.tif: 1 band; the model was trained on files of 3 bands",
        write("scene.tif", full(3, "uint8", (1, 40, 44))),
    ),
    "a scene of five bands": Case(
        PREDICT, r"scene\.tif: 5 bands; the model was trained on files of 3 bands",
        write("scene.tif", full(3, "uint8", (5, 40, 44))),
    ),
    "too few bands asked for": Case(PREDICT + " --bands 1,2", r"bands \[1, 2\]: the model reads 3"),
    "a band of the scene that is not there": Case(
        PREDICT + " --bands 1,2,9", r"scene\.tif: no band 9; it has bands 1 to 3"
    ),
    "a scene of palette indices": Case(
        PREDICT, r"scene\.png: an image of palette indices has no spectral bands; convert it to RGB",
        picture("scene.tif", ".png", palette),
    ),
    "a scene of complex numbers": Case(
        PREDICT, r"scene\.tif: holds complex numbers", write("scene.tif", full(1, "complex64"), nodata=None)
    ),
    "an array of unclear axes": Case(
        PREDICT, r"scene\.npy: which axis of \(44, 40, 44\) holds the bands", lambda w: arrays(w, 44, 40, 44)
    ),
}  # fmt: skip
