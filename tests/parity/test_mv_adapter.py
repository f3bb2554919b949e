"""The MV-Adapter replay works for other sizes, views and seeds than the golden case's, and can fail."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.parity.mv_adapter import replay


def case(seed: int, width: int, heads: int, side: int, views: int, scales: tuple[float, float]) -> Any:
    """Attentions computed row by row, as the published text says; the outputs of other parts are not in it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return 0.4 * torch.randn(*shape, generator=generator)

    found: dict[str, torch.Tensor] = {"sd.attn.to_out.0.bias": draw(width)}
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        found[f"sd.attn.{part}.weight"] = draw(width, width)
        for branch in ("mv", "ref"):
            name = part.replace(".0", "") + f"_{branch}" + (".0" if part == "to_out.0" else "")
            found[f"sd.proc.{name}.weight"] = draw(width, width)
            found[f"sd.proc.to_out_{branch}.0.bias"] = draw(width)
    for prefix, number in (("in.", views), ("in.rowcol.", 6)):
        for name in ("hidden_states", "ref_hidden_states"):
            found[prefix + name] = draw(number, side * side, width)
    x, r = found["in.hidden_states"], found["in.ref_hidden_states"]

    def heads_of(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(-1, (heads, -1)).transpose(-3, -2)

    def through(branch: str, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        owner, suffix = ("sd.attn.", "") if not branch else ("sd.proc.", f"_{branch}")
        weights = (found[f"{owner}to_{part}{suffix}.weight"] for part in "qkv")
        q, k, v = (heads_of(F.linear(t, weight)) for t, weight in zip((q, kv, kv), weights, strict=True))
        mixed = (q @ k.mT * (width / heads) ** -0.5).softmax(-1) @ v
        out = f"{owner}to_out{suffix}.0"
        return F.linear(mixed.transpose(-3, -2).flatten(-2), found[f"{out}.weight"], found[f"{out}.bias"])

    plain, reference, rows = through("", x, x), through("ref", x, r), torch.zeros_like(x)
    for row in range(side):
        here = slice(row * side, (row + 1) * side)
        for view in range(views):
            rows[view, here] = through("mv", x[view, here][None], x[:, here].reshape(1, -1, width))[0]
    found |= {"out.row.none": plain, "out.row.mv_only": plain + rows, "out.row.mv_ref": plain + rows + reference}
    found["out.row.scaled"] = plain + scales[0] * rows + scales[1] * reference
    config = {"query_dim": width, "heads": heads, "head_dim": width // heads, "side": side, "num_views": views}
    return {name: t.numpy() for name, t in found.items()}, {"config": config}


@pytest.mark.parametrize(
    ("seed", "width", "heads", "side", "views", "scales"), [(1, 12, 3, 3, 5, (0.25, 0.9)), (2, 8, 1, 5, 2, (1.3, 0.5))]
)
def test_other_cases(seed, width, heads, side, views, scales, monkeypatch):
    from tests.parity import mv_adapter

    for part in ("_encoders", "_cameras", "_schedule"):  # which the case has not
        monkeypatch.setattr(mv_adapter, part, lambda tensors, config: {})
    stored, meta = case(seed, width, heads, side, views, scales)
    pairs = replay(stored, meta)
    assert set(pairs) == {name for name in stored if name.startswith("out.")}
    for ours, theirs in pairs.values():
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    stored["out.row.mv_only"] = stored["out.row.mv_only"] + np.float32(1e-3)
    meta["config"] |= {"mv_scale": scales[0], "ref_scale": scales[1]}
    ours, theirs = replay(stored, meta)["out.row.mv_only"]
    assert float((ours - theirs).abs().max()) > 5e-4
