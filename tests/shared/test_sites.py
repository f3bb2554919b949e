"""Selection by role and depth: what is asked for and not there is an error that says what there is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shared import RequestError
from shared.sites import Site, Sites, describe

LAYER = nn.Linear(2, 2)
SITES = Sites(
    [
        Site(role, d, f"b.{d}.{role[0]}", LAYER, tags=("even",) if d % 2 == 0 else ())
        for d in range(6)
        for role in ("block", "mlp")
    ],
    "toy",
)  # fmt: skip


def depths(sites: Sites) -> list[int]:
    return [site.depth for site in sites]


def test_depths() -> None:
    assert depths(SITES.select("block")) == [0, 1, 2, 3, 4, 5]
    assert depths(SITES.select("block", "last 2")) == [4, 5]
    assert depths(SITES.select("block", "first 3")) == [0, 1, 2]
    assert depths(SITES.select("block", -1)) == [5]
    assert depths(SITES.select("block", [1, -2])) == [1, 4]
    assert depths(SITES.select(("mlp", "block"), "last 1")) == [5, 5]
    assert depths(SITES.select("mlp", tags="even")) == [0, 2, 4]
    assert len(SITES.select("mlp") + SITES.select("block", 0)) == 7


@given(st.integers(1, 6))
def test_first_and_last_partition(n: int) -> None:
    first, last = depths(SITES.select("mlp", f"first {n}")), depths(SITES.select("mlp", f"last {n}"))
    assert first == list(range(n))
    assert last == list(range(6 - n, 6))


@pytest.mark.parametrize("depth", ["last 7", "last 0", "last", "middle 2", "last -1", ""])
def test_a_depth_that_says_nothing(depth) -> None:
    with pytest.raises(RequestError, match="use 'all', 'first N', 'last N'"):
        SITES.select("block", depth)


def test_what_is_not_there() -> None:
    with pytest.raises(RequestError, match="depth .6. of toy: it has blocks 0 to 5"):
        SITES.select("block", 6)
    with pytest.raises(RequestError, match="toy has no site with role 'blok'; nearest: 'block'; it has block, mlp"):
        SITES.select("blok")
    with pytest.raises(RequestError, match="no site of toy has role 'mlp' at depth 1 with tags"):
        SITES.select("mlp", 1, "even")


def test_describe_reads_module_types() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4),
        nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
        nn.Conv1d(1, 1, 1),
        nn.LayerNorm(4),
        nn.Embedding(3, 4),
    )
    sites = describe(model)
    assert sites.roles == (
        "model", "linear", "attention", "attention.query", "attention.key", "attention.value", "attention.output",
        "conv", "norm", "embedding",
    )  # fmt: skip
    assert len({site.key for site in sites}) == len(sites)
    shapes = {site.role: tuple(site.weight.shape) for site in sites if site.parameter}
    assert shapes["attention.query"] == (4, 4)
    assert shapes["attention.key"] == (4, 3)
    assert shapes["attention.value"] == (4, 5)
    with pytest.raises(RequestError, match="has no parameter None to adapt"):
        _ = sites.select("attention")[0].weight


def test_fused_rows_partition_the_weight() -> None:
    attention = nn.MultiheadAttention(6, 2)
    rows = [s for s in describe(attention) if s.rows]
    assert torch.equal(torch.cat([s.weight for s in rows]), attention.in_proj_weight)
