"""VL-Adapter: its adapters on the output of a sub-layer that gives its input; LoRA, prompt and visual tokens.

Of ``hyper_task_for_outputs``, the first task is that of the hypernetworks of encoder and decoder, the last that of the
one for all places.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modalities.vision_language.visual_embedding import VisualEmbedding, downsample
from shared.adapted import Adapted, adapt
from shared.blocks.prompt_encoder import PromptEncoder
from shared.method import Method
from shared.methods import Compacter, Hyperformer, LoRA, LowRankAdapter, VLAdapter
from shared.sites import Site, Sites

SHARE = {"single": "all", "multiple": "none", "halfdown": "down", "halfup": "up", "prenorm": "none"}
PHM = {"phm_rule": "rule.whole", "phm_rule_left": "rule.left", "phm_rule_right": "rule.right", "W": "weight",
       "W_left": "left", "W_right": "right", "b": "bias"}  # fmt: skip
PLACES = {"mlp": "feed_forward", "attention": "self_attention", "cross_attention": "cross_attention"}
SITES = {"mlp": "mlp.down", "attention": "attention.output", "cross_attention": "attention.output"}


def replay(case: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, tuple[Tensor, np.ndarray]]:
    config, tensors = meta["config"], {name: torch.as_tensor(value) for name, value in case.items()}
    here = {name.partition(".")[2].partition("/")[0] for name in case if name.startswith("out.")}
    ours: dict[str, Tensor] = {}
    with torch.no_grad():
        for name in sorted(here & SHARE.keys()):
            ours |= _shared(name, under(tensors, f"sd.{name}/"), tensors["in.x"], config)
        for name in sorted(here & {"compacter", "compacter_fact", "lowrank"}):
            ours |= _structured(name, under(tensors, f"sd.{name}/"), tensors["in.x"], config)
        for name in sorted(here & {"hyper_enc", "hyper_dec", "hyper_one"}):
            ours |= _generated(name, tensors, config)
        if "lora" in here:
            ours |= _lora(under(tensors, "sd.lora/"), tensors["in.x"], config)
        if "prompt" in here:
            ours |= _prompts(under(tensors, "sd.prompt/prompts."), len(tensors["in.x"]), config)
        if "vis" in here:
            ours |= _visual(tensors)
    return {name: (value, case[name]) for name, value in ours.items() if name in case}


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _place(method: Method, width: int, name: str = "default") -> Adapted:
    layer = nn.Identity()
    site = Site("mlp.down", 0, "", layer, parameter=None, width=width)
    return adapt(layer, method, name=name, sites=Sites([site]))


def _shared(name: str, sd: dict[str, Tensor], x: Tensor, config: dict[str, Any]) -> dict[str, Tensor]:
    tasks, norms = config["tasks"], {n: f"{n}_layer_norm.weight" in sd for n in ("pre", "post")}
    share: Any = SHARE[name]
    if name == "prenorm":  # one module for all tasks, or one for each: the state dict repeats it
        first = f"adapters.{tasks[0]}."
        same = all(torch.equal(t, sd[n.replace(first, f"adapters.{task}.")]) for n, t in sd.items() for task in tasks
                   if n.startswith(first))  # fmt: skip
        share = "all" if same else "none"
    method = VLAdapter(
        share=share, tasks=tasks, reduction=config["reduction_factor"], sublayers=("mlp",),
        norm_before=norms["pre"], norm_after=norms["post"],
    )  # fmt: skip
    model = _place(method, config["d"])
    (adapter,) = model.bank["default"].values()
    renamed = {
        n.replace("adapters.", "branches.").replace("_sampler", "").replace("pre_layer_norm", "before")
        .replace("post_layer_norm", "after"): t
        for n, t in sd.items()
    }  # fmt: skip
    if share == "all":
        renamed = {n.replace(f"branches.{tasks[0]}.", "branches.all."): t for n, t in renamed.items()}
        renamed = {n: t for n, t in renamed.items() if not any(n.startswith(f"branches.{task}.") for task in tasks)}
    adapter.load_state_dict(renamed)
    return {f"out.{name}/{task}": model(x, context={"task": task}) for task in tasks}


def _structured(name: str, sd: dict[str, Tensor], x: Tensor, config: dict[str, Any]) -> dict[str, Tensor]:
    """An adapter for each task, by name."""
    tasks, some = config["tasks"], under(sd, f"adapters.{config['tasks'][0]}.down_sampler.")
    rank = some["W_left"].shape[-1] if "W_left" in some else None
    given: dict[str, Any] = {"reduction": config["reduction_factor"], "sublayers": ("mlp",), "rank": rank}
    if name == "lowrank":
        method: Method = LowRankAdapter(**given)
    else:
        n = len(some.get("phm_rule", some.get("phm_rule_left")))  # type: ignore[arg-type]
        method = Compacter(n=n, shared_rule=False, factorised_rule="phm_rule_left" in some, **given)
    model = _place(method, config["d"], tasks[0])
    for task in tasks[1:]:
        model.add(method, name=task)
    found = {}
    for task in tasks:
        model.activate(task)
        (adapter,) = model.bank[task].values()
        for layer in ("down", "up"):
            theirs = under(sd, f"adapters.{task}.{layer}_sampler.")
            getattr(adapter.branch, layer).load_state_dict({PHM[n]: t for n, t in theirs.items()})
        found[f"out.{name}/{task}"] = model(x)
    return found


def _generated(name: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    sd, x = under(tensors, f"sd.{name}/"), tensors["in.x"]
    embeddings = under(tensors, "sd.hyper_task/task_to_embeddings.")
    layers, unique = len(sd["layer_id_embeddings.weight"]), "adapters_block_type.weight" in sd
    cross = unique or any(n.startswith("cross_attention") for n in sd)
    backbone = nn.ModuleDict(
        {f"{place}{i}": nn.Identity() for i in range(layers) for place in list(PLACES)[: 2 + cross]}
    )
    sites = Sites(
        Site(SITES[place], i, f"{place}{i}", backbone[f"{place}{i}"], None, width=config["d"],
             tags=("cross",) if place == "cross_attention" else ())
        for i in range(layers) for place in list(PLACES)[: 2 + cross]
    )  # fmt: skip
    hidden, projected = (len(sd[f"task_hypernet.task_embeding_generator.{i}.weight"]) for i in (0, 2))
    method = Hyperformer(
        tasks=list(embeddings), reduction=config["reduction_factor"], embedding=len(next(iter(embeddings.values()))),
        hidden=hidden, projected=projected, unique=unique,
    )  # fmt: skip
    model = adapt(backbone, method, sites=sites)
    hyper: Any = next(iter(model.bank["default"].values())).hyper
    hyper.load_state_dict(hyper_state(sd, embeddings))
    task = config["hyper_task_for_outputs"][-1 if name == "hyper_one" else 0]
    model.context.task = task
    found = {}
    for i in range(layers):
        for place in hyper.places:
            key = f"out.{name}/L{i}/{PLACES[place]}"
            found[f"{key}/y"] = backbone[f"{place}{i}"](x)
            for part, value in hyper(task, i, place).items():
                found[f"{key}_{part.replace('.', '_')}"] = value
    return found


def hyper_state(sd: dict[str, Tensor], embeddings: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published hypernetwork's tensors by our names."""
    fixed = {"layer_id_embeddings": "layers", "adapters_block_type": "kinds", "LayerNorm": "norm",
             "task_hypernet.task_embeding_generator": "project"}  # fmt: skip
    found = {f"embeddings.{task}.weight": vector[None] for task, vector in embeddings.items()}
    for name, tensor in sd.items():
        theirs = next((t for t in fixed if name.startswith(f"{t}.")), None)
        if theirs is not None:
            found[name.replace(theirs, fixed[theirs], 1)] = tensor
            continue
        net, part, _, kind = name.split(".")
        place = next((ours for ours, theirs in PLACES.items() if net.startswith(theirs)), "all")
        layer = "up" if "up_sampler" in net else "down"
        found[f"generators.{place}.{layer}/{part.partition('_')[0]}.{kind}"] = tensor
    return found


def _lora(sd: dict[str, Tensor], x: Tensor, config: dict[str, Any]) -> dict[str, Tensor]:
    """A frozen linear layer with a LoRA for each task."""
    rows, columns = sd["weight"].shape
    linear = nn.Linear(columns, rows)
    linear.load_state_dict({"weight": sd["weight"], "bias": sd["bias"]})
    method = LoRA(
        rank=len(sd[f"lora_As.{config['tasks'][0]}"]), alpha=config.get("lora_alpha", 32), roles=("attention.query",)
    )
    model = Adapted(linear, sites=Sites([Site("attention.query", 0, "", linear)]))
    found = {}
    for task in config["tasks"]:
        model.add(method, name=task)
        (change,) = model.bank[task].values()
        change.down.copy_(sd[f"lora_As.{task}"])
        change.up.copy_(sd[f"lora_Bs.{task}"].t())
        found[f"out.lora/{task}"] = model.eval()(x)
    return found


def _prompts(sd: dict[str, Tensor], batch: int, config: dict[str, Any]) -> dict[str, Tensor]:
    found = {}
    for task in config["tasks"]:
        theirs = under(sd, f"{task}.prefix_embedding.")
        count, width = theirs["0.weight"].shape
        encoder = PromptEncoder(count, width, len(theirs["1.weight"]))
        names = {"0.weight": "embeddings"} | {
            f"{n}.{p}": f"network.{n - 1}.{p}" for n in (1, 3) for p in ("weight", "bias")
        }
        encoder.load_state_dict({names[n]: t for n, t in theirs.items()})
        found[f"out.prompt/{task}"] = encoder().expand(batch, -1, -1)
    return found


def _visual(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    small = downsample(tensors["in.vis/feats"], round(tensors["out.vis/down"].shape[1] ** 0.5))
    sd = under(tensors, "sd.visual_embedding/")
    embedding = VisualEmbedding(
        small.shape[2], sd["feat_embedding.0.weight"].shape[0], images=len(sd["img_order_embedding.weight"])
    )
    names = {"feat_embedding": "feature", "absolute_vis_pos_embedding": "position", "img_order_embedding": "image"}
    words = nn.Embedding(*sd["obj_order_embedding.weight"].shape)
    words.load_state_dict({"weight": sd.pop("obj_order_embedding.weight")})
    embedding.load_state_dict({n.replace(p := n.partition(".")[0], names[p], 1): t for n, t in sd.items()})
    return {"out.vis/down": small, "out.vis/embed": embedding(small, tensors["in.vis/pos"], words)}
