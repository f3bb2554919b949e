"""One forward for a batch whose rows have different adapters equals a forward for each, or is not tried."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
from torch import Tensor, nn

from shared import LoRA, adapt
from shared.methods import AdaptFormer, BitFit, ParallelAdapter, SeriesAdapter
from shared.rows import _one_by_one
from tests.shared.hosts import HOSTS, vit

EVERY = ("attention.query", "attention.key", "attention.value", "attention.output", "mlp.up", "mlp.down")
METHODS = {
    "LoRA": LoRA(rank=2, alpha=3.0, roles=EVERY),
    "LoRA of another rank": LoRA(rank=5, roles=("attention.query", "mlp.up")),
    "LoRA of whole projections, last blocks": LoRA(rank=3, roles="attention.qkv", depth="last 2"),
    "AdaptFormer": AdaptFormer(width=5, dropout=0.0),
    "AdaptFormer of another width": AdaptFormer(width=7, scale=0.5, dropout=0.1),
    "series": SeriesAdapter(width=5, scale="learned"),
    "series, other activation": SeriesAdapter(width=3, activation="gelu", roles=("mlp.up",)),
    "series after rows": SeriesAdapter(width=4, roles=("attention.output",)),
    "parallel to rows": ParallelAdapter(width=5, roles=("attention.query", "attention.value")),
    "parallel, linear": ParallelAdapter(width=5, activation="none", roles=("mlp.down",)),
}
ROWS = ["LoRA", None, "series", "LoRA", "AdaptFormer", "parallel to rows", *METHODS, None]


def filled(model, *names: str):
    with torch.no_grad():
        for name in names or model.methods:
            for parameter in model.bank[name].parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


def model_of(methods: dict, host=vit):
    backbone, inputs, sites = host()
    model = adapt(backbone, next(iter(methods.values())), name=next(iter(methods)), sites=sites, example=inputs)
    for name, method in list(methods.items())[1:]:
        model.add(method, name=name, example=inputs)
    return filled(model).eval()


def images(count: int) -> tuple[Tensor, ...]:
    return (torch.randn(count, 3, 32, 40),)


def each(model, inputs, rows):
    return _one_by_one(model, rows, getattr(model.backbone, "batch_dim", 0), inputs, {})


def leaves(output) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def far(a, b) -> float:
    return max(float((x - y).detach().abs().max()) for x, y in zip(leaves(a), leaves(b), strict=True))


def test_all_methods_in_one_batch_equal_their_own_runs() -> None:
    model, inputs = model_of(METHODS), images(len(ROWS))
    model.state.form = "separate"
    with torch.no_grad():
        together = model(*inputs, adapters=ROWS)
        assert model.state.by_rows == "in one forward"
        alone = each(model, inputs, ROWS)
        model.activate()
        bare = model(*inputs)
    assert far(together, alone) < 1e-5 * max(1.0, float(bare.summary.abs().max()))
    changed = (together.summary - bare.summary).abs().amax(1)
    assert [float(c) > 1e-3 for c in changed] == [name is not None for name in ROWS]
    assert model.state.rows is None


def test_the_bare_rows_are_the_bare_model() -> None:
    model, inputs = model_of({"a": METHODS["LoRA"], "b": METHODS["AdaptFormer of another width"]}), images(4)
    with torch.no_grad():
        together = model(*inputs, adapters=["a", None, "b", None]).summary
        with model.disabled():
            bare = model(*inputs).summary
    assert torch.equal(together[1::2], bare[1::2])


def test_gradients_equal_those_of_own_runs() -> None:
    model, inputs = model_of(METHODS).double(), tuple(t.double() for t in images(len(ROWS)))
    weights, found = torch.randn(len(ROWS), 24, dtype=torch.double), []
    for run in (lambda: model(*inputs, adapters=ROWS), lambda: each(model, inputs, ROWS)):
        model.zero_grad()
        (run().summary * weights).sum().backward()
        found.append({n: p.grad.clone() for n, p in model.bank.named_parameters()})
    assert model.state.by_rows == "in one forward"
    for name, gradient in found[1].items():
        assert gradient.count_nonzero()
        assert torch.allclose(found[0][name], gradient, rtol=1e-8, atol=1e-10), name


@pytest.mark.parametrize("host", ["llama", "bert"])
def test_a_language_model(host) -> None:
    roles = ("attention.value", "mlp.up", "mlp.down")
    methods = {
        "a": LoRA(rank=2, roles=roles),
        "b": ParallelAdapter(width=5, roles=roles),
        "c": LoRA(rank=4, roles=roles),
    }
    model = model_of(methods, HOSTS[host])
    _, inputs, _ = HOSTS[host]()
    with torch.no_grad():
        together = model(*inputs, adapters=["b", "c", "a"])
        assert model.state.by_rows == "in one forward"
        assert far(together, each(model, inputs, ["b", "c", "a"])) < 1e-5


def test_stacks_follow_the_adapters() -> None:
    model, inputs = model_of({"a": METHODS["LoRA"], "b": METHODS["AdaptFormer"]}).double(), images(2)
    for change in (
        lambda: filled(model),
        lambda: [setattr(p, "data", p.data * 2) for p in model.bank.parameters()],
        lambda: [p.data.mul_(0.5) for p in model.bank.parameters()],
        lambda: model.backbone.load_state_dict({n: t * 1.01 for n, t in model.backbone.state_dict().items()}),
        lambda: model.float(),
    ):
        with torch.no_grad():
            before = model(*(t.double() for t in inputs), adapters=["a", "b"])
            change()
            dtype = next(model.bank.parameters()).dtype
            given = tuple(t.to(dtype) for t in inputs)
            together = model(*given, adapters=["a", "b"])
            assert model.state.by_rows == "in one forward"
            assert far(together, each(model, given, ["a", "b"])) < (1e-9 if dtype is torch.double else 1e-4)
            assert dtype is torch.float or far(together, before) > 1e-3


class Windows(nn.Module):
    """Cuts its tokens (B, 8, C) into windows of ``size`` for one layer, as Swin does."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.windowed, self.whole = size, nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.windowed(x.unflatten(1, (-1, self.size)).flatten(0, 1)).tanh()
        return self.whole(y.unflatten(0, (len(x), -1)).flatten(1, 2))


class TokensFirst(nn.Module):
    """Runs its layer on (N, B, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1).tanh()


class Shuffled(nn.Module):
    """Runs its layer on the batch in reverse."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flip(0)).flip(0).tanh()


class Queries(nn.Module):
    """Runs its layer on learned queries, of which there are as many as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.layer = nn.Parameter(torch.randn(4, 1, 6)), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.queries).mean(0)


class Read(nn.Module):
    """Reads the weight of its layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.layer.weight.t()).tanh()


NOT_GIVEN_ROWS = "a layer is not given one row a sample, in the batch's order"


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        (Windows(4), NOT_GIVEN_ROWS),
        (Windows(8), None),
        (TokensFirst(), NOT_GIVEN_ROWS),
        (Shuffled(), NOT_GIVEN_ROWS),
        (Queries(), NOT_GIVEN_ROWS),
        (Read(), "an adapted tensor is read without a call of its layer"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_that_are_not_given_rows_run_adapter_by_adapter(host, reason) -> None:
    x, names = torch.randn(4, 8, 6), ["a", "b", None, "a"]
    if isinstance(host, TokensFirst):
        x = x[:, :4]  # as many tokens as samples: the shapes do not tell
    model = adapt(host, LoRA(rank=2, roles="linear"), name="a", example=(x,))
    model.add(LoRA(rank=3, roles="linear"), name="b")
    filled(model).eval()
    with torch.no_grad():
        together = model(x, adapters=names)
        assert model.state.by_rows == ("in one forward" if reason is None else f"one forward an adapter: {reason}")
        assert far(together, each(model, (x,), names)) < 1e-5


def test_an_input_of_another_size_that_makes_windows_is_noticed_in_the_call() -> None:
    model = adapt(Windows(8), LoRA(rank=2, roles="linear"), name="a")
    model.add(LoRA(rank=2, roles="linear"), name="b")
    filled(model).eval()
    with torch.no_grad():
        for tokens, stacked in ((8, True), (16, False)):
            x = torch.randn(3, tokens, 6)
            together = model(x, adapters=["a", "b", "a"])
            assert model.state.by_rows.startswith("in one") == stacked
            assert far(together, each(model, (x,), ["a", "b", "a"])) < 1e-5


def test_tokens_first_throughout_is_a_batch_along_the_second_dimension() -> None:
    host = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    host.batch_dim = 1
    model = adapt(host, LoRA(rank=2, roles="linear"), name="a")
    model.add(LoRA(rank=3, roles="linear"), name="b")
    filled(model).eval()
    x = torch.randn(5, 3, 6)
    with torch.no_grad():
        together = model(x, adapters=["a", "b", None])
        assert model.state.by_rows == "in one forward"
        assert far(together, each(model, (x,), ["a", "b", None])) < 1e-5


@pytest.mark.parametrize(
    ("host", "method", "reason"),
    [
        ("vit", BitFit(), "adapter 'b' changes bias of a Conv2d, not a linear layer's"),
        ("convolutions", LoRA(rank=2, roles="conv"), "adapter 'a' changes weight of a Conv2d, not a linear layer's"),
        ("attention", LoRA(rank=2), "adapter 'a' changes in_proj_weight of a SelfAttention"),
    ],
)
def test_adapters_that_are_no_branches_run_one_by_one(host, method, reason) -> None:
    roles = {"vit": "mlp.up", "convolutions": "conv", "attention": "attention.output"}[host]
    model = model_of({"a": LoRA(rank=2, roles=roles), "b": method}, HOSTS[host])
    _, inputs, _ = HOSTS[host]()
    with torch.no_grad():
        together = model(*inputs, adapters=["a", "b", None])
        assert model.state.by_rows.startswith("one forward an adapter: adapter")
        assert far(together, each(model, inputs, ["a", "b", None])) < 1e-5


def test_dropout_in_training_is_each_adapters_own() -> None:
    model = model_of({"a": LoRA(rank=2, dropout=0.5), "b": AdaptFormer(width=3)})
    model.train()
    model(*images(2), adapters=["a", "b"])
    assert model.state.by_rows == "one forward an adapter: adapter 'a' drops inputs in training"


def test_a_cache_that_a_try_would_change_is_left_alone() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x, cache=None):
            if cache is not None:
                cache.calls += 1
            return self.layer(x)

    class Cache:
        calls = 0

    model = adapt(Counts(), LoRA(rank=2, roles="linear"), name="a")
    model.add(LoRA(rank=2, roles="linear"), name="b")
    cache = Cache()
    model.eval()(torch.randn(2, 6), adapters=["a", "b"], cache=cache)
    assert cache.calls == 2
    assert model.state.by_rows == "one forward an adapter: the input holds a Cache"


def test_an_adapter_costs_its_parameters_and_nothing_more() -> None:
    def held() -> dict[int, int]:
        """Bytes by address of all tensors that hold memory of their own."""
        gc.collect()
        storages = {}
        for thing in gc.get_objects():
            if type(thing) in (Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
                with contextlib.suppress(RuntimeError):  # those that a compiler left behind have none
                    storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        return storages

    inputs, method = images(8), METHODS["LoRA"]
    model = model_of({f"a{i}": method for i in range(2)})
    model.state.form = "separate"
    model.eval()  # without folds
    size = 4 * sum(p.numel() for p in model.bank["a0"].parameters())
    with torch.no_grad():
        model(*inputs, adapters=["a0", "a1"] * 4)
        before = held()
        for i in range(2, 8):
            model.add(method, name=f"a{i}")
        filled(model)
        model(*inputs, adapters=[f"a{i}" for i in range(8)])
        assert model.state.by_rows == "in one forward"
        assert sum(held_bytes for at, held_bytes in held().items() if at not in before) == 6 * size
