"""One adapter per sample: whatever the inputs' nesting, and refused where the batch is not what was named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shared import LoRA, RequestError, adapt


class Nested(nn.Module):
    """Takes and gives dictionaries, and a table that is no part of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, batch: dict[str, Tensor], table: Tensor) -> dict[str, Tensor]:
        y = self.layer(batch["x"]) + table.sum()
        return {"y": y, "twice": (y * 2).flatten(1)}


def adapted(host: nn.Module):
    model = adapt(host, LoRA(rank=2, roles="linear"), name="a").eval()
    model.add(LoRA(rank=2, roles="linear"), name="b")
    for parameter in model.bank.parameters():
        nn.init.normal_(parameter)
    return model


def test_nested_inputs_and_outputs() -> None:
    model, x, table = adapted(Nested()), torch.randn(4, 3, 4), torch.ones(7)
    with torch.no_grad():
        together = model({"x": x}, table, adapters=["b", "a", None, "b"])
        for i, name in enumerate(["b", "a", None, "b"]):
            model.activate(*([name] if name else []))
            alone = model({"x": x[i : i + 1]}, table)
            assert torch.allclose(together["y"][i], alone["y"][0], atol=1e-6)
            assert torch.allclose(together["twice"][i], alone["twice"][0], atol=1e-6)


def test_a_backbone_that_batches_along_its_second_dimension() -> None:
    host = nn.TransformerEncoderLayer(8, 2, 8).eval()
    host.batch_dim = 1
    model, x = adapted(host), torch.randn(5, 3, 8)
    with torch.no_grad():
        together = model(x, adapters=["b", "a", "b"])
        model.activate("a")
        assert torch.allclose(together[:, 1:2], model(x[:, 1:2]), atol=1e-6)


def test_training_by_rows_reaches_every_named_adapter() -> None:
    model = adapted(Nested())
    model.activate("a", "b")
    model({"x": torch.randn(2, 3, 4)}, torch.ones(1), adapters=["a", "b"])["y"].sum().backward()
    assert all(p.grad is not None for p in model.bank.parameters())
    assert model.active == ("a", "b")


@pytest.mark.parametrize(
    ("names", "message"),
    [(["a"], "names 1 samples; the batch has 3 samples"), (["a", "b", "c"], "no adapter 'c'; loaded: a, b")],
)
def test_what_does_not_fit_the_batch(names, message) -> None:
    model = adapted(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(RequestError, match=message):
        model(torch.randn(3, 4), adapters=names)
    assert model.active == ("b",)
