"""Many adapters on one model: switching among them, and a batch whose rows each have their own.

``python -m tests.benchmarks.many_adapters``. Random weights; ViT-S/16 of four blocks (ratios do not depend on their
number) and all of its linear layers, unless a case says otherwise.
"""

from __future__ import annotations

import copy
import gc
import itertools
import timeit
from collections.abc import Iterator
from typing import Any

from tests.benchmarks.harness import Row, ratios, run, spread

LAYERS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
LOADED, ROWS, DISTINCT, PEFT = 100, 32, 16, 16


def measure() -> Iterator[Row]:
    import torch

    with torch.no_grad():
        yield from _switching()
        yield from _by_rows()


def _bare() -> Any:
    import timm

    return timm.create_model("vit_small_patch16_224", depth=4).eval()


def _loaded(method: Any, count: int) -> Any:
    """A model with ``count`` adapters, n0, n1 …, of other values each."""
    import torch

    from modalities.images.backbones import TimmViT
    from shared.adapted import Adapted

    backbone = TimmViT(3, name="vit_small_patch16_224", weights="random", image_size=224, model_args={"depth": 4})
    backbone.example = lambda: None  # no proof: it is the time of running that counts here
    model = Adapted(backbone)
    for i in range(count):
        model.add(method, name=f"n{i}")
    for name, parameter in model.bank.named_parameters():
        if ".up" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def _peft(count: int) -> Any:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(_bare(), LoraConfig(r=8, target_modules=LAYERS), adapter_name="n0")
    for i in range(1, count):
        model.add_adapter(f"n{i}", LoraConfig(r=8, target_modules=LAYERS))
    return model.eval()


def _switching() -> list[Row]:
    import torch

    from shared import LoRA

    method = LoRA(rank=8, roles=("attention.qkv", "attention.output", "mlp.up", "mlp.down"))
    model, theirs, image = _loaded(method, LOADED), _peft(10), torch.randn(1, 3, 224, 224)
    names = itertools.cycle(model.methods)
    micro = [1e6 * t / 1000 for t in timeit.repeat(lambda: model.activate(next(names)), number=1000, repeat=9)]
    few = itertools.cycle(f"n{i}" for i in range(10))
    slow = [1e6 * t / 5 for t in timeit.repeat(lambda: theirs.set_adapter(next(few)), number=5, repeat=5)]
    rows = [
        Row(f"switching, {LOADED} loaded", "microseconds", *spread(micro), target=10),
        Row("switching in peft, 10 loaded", "microseconds", *spread(slow)),
    ]
    two, all_of_them = itertools.cycle(["n0", "n1"]), itertools.cycle(model.methods)

    def switched(among: Any) -> None:
        model.activate(next(among))
        model(image)

    def bare() -> None:
        model.activate()
        model(image)

    def theirs_switched() -> None:
        theirs.set_adapter(next(few))
        theirs(image)

    cases = {
        "batch 1, two in turn": lambda: switched(two),
        f"batch 1, {LOADED} in turn": lambda: switched(all_of_them),
        "batch 1, 10 in turn in peft": theirs_switched,
    }
    notes = ("both folded after a few calls", "beside the layers: no fold pays", "")
    found = ratios(cases, bare, repeats=31, warmup=8)
    rows += [
        Row(name, "switch and call / bare", *found[name], note=note) for name, note in zip(cases, notes, strict=True)
    ]
    model.state.form = "separate"
    model.eval()  # lets go of the folds
    held = _bytes()
    model.add(method, name="more")
    own = sum(p.numel() * p.element_size() for p in model.bank["more"].parameters())
    model.activate("n0")
    return [
        *rows,
        Row("memory of one more adapter", "bytes / its parameters'", *[(_bytes() - held) / own] * 3, target=1.0),
    ]


def _bytes() -> int:
    import torch

    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _by_rows() -> Iterator[Row]:
    import torch

    from shared import LoRA
    from shared.methods import AdaptFormer, ParallelAdapter, SeriesAdapter

    every = ("attention.qkv", "attention.output", "mlp.up", "mlp.down")
    methods = {
        "LoRA, rank 8, query and value": LoRA(rank=8),
        "LoRA, rank 8, all linear layers": LoRA(rank=8, roles=every),
        "LoRA, rank 64, all linear layers": LoRA(rank=64, roles=every),
        "AdaptFormer, width 64": AdaptFormer(),
        "series adapters, width 64": SeriesAdapter(width=64, activation="relu"),
        "parallel adapters, width 64": ParallelAdapter(width=64, activation="relu", roles=("mlp.up", "mlp.down")),
    }
    image = torch.randn(ROWS, 3, 224, 224)
    names = [f"n{i % DISTINCT}" for i in range(ROWS)]
    for case, method in methods.items():
        model = _loaded(method, DISTINCT)
        model.activate("n0")
        model.fold()
        found = ratios({case: lambda m=model: m(image, adapters=names)}, lambda m=model: m(image), repeats=5, warmup=1)
        assert model.state.by_rows == "in one forward", model.state.by_rows
        note = f"{ROWS} rows over {DISTINCT} adapters"
        yield Row(case, "by rows / one adapter", *found[case], target=1.25, note=note)
    theirs = _peft(DISTINCT)
    alone = copy.deepcopy(theirs)
    alone.set_adapter("n0")
    found = ratios({"peft": lambda: theirs(image, adapter_names=names)}, lambda: alone(image), repeats=5, warmup=1)
    yield Row("peft, rank 8, all linear layers", "by rows / one adapter", *found["peft"], note="not folded")


run(__name__, measure)
