"""Replay of PeftCD: the adapter before a block, the exchange of levels, the decoder's stages, the residual block."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modalities.remote_sensing.heads.change import ResDecodeBlock, SSBiFPNDecoder, exchange
from modalities.remote_sensing.peftcd import Prompt
from shared.backbone import Features


class Toy(nn.Module):
    """The case's frozen block: attention of one head on x itself, with a residual."""

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        out, width = state["attn.qkv.weight"].shape
        self.qkv, self.proj = nn.Linear(width, out), nn.Linear(width, width)
        self.load_state_dict({name.removeprefix("attn."): tensor for name, tensor in state.items()})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.proj((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v)


@torch.no_grad()
def replay(case: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, tuple[Tensor, np.ndarray]]:
    config = meta["config"]
    found = adapter(case, config["adapter_hidden"]) | decoder(case, config["mid_ch"])
    residual = ResDecodeBlock(case["in.resdecode_in"].shape[1]).eval()
    fill(residual, part(case, "resdecode."))
    found["out.resdecode"] = residual(torch.from_numpy(case["in.resdecode_in"]))
    return {name: (value, case[name]) for name, value in found.items() if name in case}


def adapter(case: dict[str, np.ndarray], width: int) -> dict[str, Tensor]:
    tokens, state = torch.from_numpy(case["in.tokens"]), part(case, "adapter.")
    prompt = Prompt(tokens.shape[-1], width, "case")
    names = {"prompt_learn.0.": "down.", "prompt_learn.2.": "up."}
    own = {new + n.removeprefix(old): t for n, t in state.items() for old, new in names.items() if n.startswith(old)}
    prompt.branch.load_state_dict(own)
    block = Toy({n.removeprefix("block."): t for n, t in state.items() if n.startswith("block.")})
    return {"out.adapter_prompt": prompt.prompted(tokens) - tokens, "out.adapter_block": prompt(block, tokens)}


def decoder(case: dict[str, np.ndarray], width: int) -> dict[str, Tensor]:
    dates = []
    for date in "AB":
        start = f"in.feat{date}"
        levels = sorted(int(name.removeprefix(start)) for name in case if name.startswith(start))
        dates.append([torch.from_numpy(case[f"{start}{level}"]) for level in levels])
    first, _ = exchange(*dates)
    head = SSBiFPNDecoder([m.shape[1] for m in first], int(case["out.out_shape"][1]), width=width).eval()
    fill(head, part(case, "decoder."))
    maps = tuple(torch.cat(pair) for pair in zip(*dates, strict=True))
    size = (int(case["out.out_shape"][2]), int(case["out.out_shape"][3]))
    logits = head(Features(maps, maps[-1].mean((2, 3))), size)
    before, after = logits.chunk(2)
    fused = head.fuse(first)
    return {
        "out.exchanged_from_B": torch.tensor([a is b for a, b in zip(first, dates[1], strict=True)]).long(),
        "out.fuse": fused,
        "out.context": head.context(fused),
        "out.outA_s4": before[..., ::4, ::4],
        "out.outB_s4": after[..., ::4, ::4],
        "out.mean_logits_s4": ((before + after) / 2)[..., ::4, ::4],
        "out.out_shape": torch.tensor(before.shape),
    }


def part(case: dict[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    start = f"sd.{prefix}"
    return {name.removeprefix(start): torch.from_numpy(a) for name, a in case.items() if name.startswith(start)}


def fill(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Strictly, but for the counts of batches, which no case holds."""
    counts = {n: t for n, t in module.state_dict().items() if n.endswith("num_batches_tracked")}
    module.load_state_dict(counts | state)
