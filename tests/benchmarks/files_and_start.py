"""Adapter files against bare safetensors and peft, and how soon the program answers.

``python -m tests.benchmarks.files_and_start``. LoRA of rank 8 on all linear layers of a random ViT-S/16. Starts are of
fresh processes, whose files the system has in memory.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.harness import Row, ratios, run, seconds, spread

LAYERS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
CLI = "import sys; from shared.cli import main; sys.exit(main(sys.argv[1:]))"


def measure() -> Iterator[Row]:
    yield from _start()
    yield from _files()


def _process(code: str, *arguments: str, status: int = 0) -> None:
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == status, done.stderr


def _start() -> Iterator[Row]:
    names = "import shared; shared.adapt, shared.LoRA, shared.Sites, shared.load"
    found = ratios({"import": lambda: _process(names)}, lambda: _process("import torch"), repeats=7, warmup=1)
    yield Row("import shared, and what it offers", "seconds / import torch", *found["import"], target=1.15)
    helps = [seconds(lambda: _process(CLI, "--help")) for _ in range(9)]
    yield Row("omniadapt --help", "seconds", *spread(helps), target=0.3)
    wrong = ("run", "quickstart", "--tiny", "method.rnk=8")
    fails = [seconds(lambda: _process(CLI, *wrong, status=2)) for _ in range(9)]
    yield Row("a recipe with a wrong setting", "seconds to the message", *spread(fails), target=2.0)


def _files() -> Iterator[Row]:
    import timm
    import torch
    from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    from shared import LoRA, adapt
    from shared.sites import Sites, describe

    backbone = timm.create_model("vit_small_patch16_224")
    sites = Sites([s for s in describe(backbone) if re.fullmatch(LAYERS, s.path)], "ViT")
    model = adapt(backbone, LoRA(rank=8, roles="linear"), sites=sites)
    theirs = get_peft_model(timm.create_model("vit_small_patch16_224"), LoraConfig(r=8, target_modules=LAYERS))
    tensors = model.trained_state()
    hashing = seconds(lambda: model.fingerprint)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        ours, bare = Path(folder, "ours.safetensors"), Path(folder, "bare.safetensors")

        def flushed() -> None:
            save_file(tensors, bare)
            with open(bare, "rb+") as file:
                os.fsync(file.fileno())

        def loaded() -> None:
            for name, tensor in load_file(bare).items():
                tensors[name].copy_(tensor)

        def theirs_loaded() -> None:
            set_peft_model_state_dict(theirs, load_peft_weights(folder + "/peft", device="cpu"))

        saves = {"ours": lambda: model.save(ours), "peft": lambda: theirs.save_pretrained(folder + "/peft")}
        found = ratios(saves, flushed, repeats=31)
        note = "both flushed to the disk"
        yield Row("save", "ours / bare safetensors", *found["ours"], target=1.2, note=note)
        yield Row("save", "peft / bare safetensors", *found["peft"], note="bare one flushed, peft's not")
        found = ratios({"": lambda: model.save(ours)}, lambda: save_file(tensors, bare), repeats=31)
        yield Row("save", "ours / bare, not flushed", *found[""], note="what being safe from a power cut costs")
        found = ratios({"ours": lambda: model.load(ours), "peft": theirs_loaded}, loaded, repeats=31)
        yield Row("load", "ours / bare safetensors", *found["ours"], target=1.2, note="read and copied into the model")
        yield Row("load", "peft / bare safetensors", *found["peft"])
        payload = sum(t.numel() * t.element_size() for t in tensors.values())
        yield Row("size", "file / its tensors", *[ours.stat().st_size / payload] * 3)
    yield Row("hash of the backbone, once a model", "seconds", hashing, hashing, hashing)


run(__name__, measure)
