"""What must hold of BlackVIP."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from modalities.images.backbones import BlackBox
from modalities.images.black_vip import BlackVIP, Coordinator, Decoder
from modalities.images.classification import Classification
from modalities.images.data import GeneratedImages
from modalities.images.heads import Logits
from shared import adapt
from shared.adapted import Adapted
from shared.errors import RequestError, WorkError
from shared.training import SPSA, Engine, Optimiser, fit
from tests.shared.training.test_fit import Interrupted, interrupt
from tests.shared.training.test_resume import checkpoint, same

ENCODER = {"patch_size": 8, "model_args": {"depth": 1, "embed_dim": 24, "num_heads": 3}}
SMALL = {"encoder": "vit_small_patch16_224", "encoder_weights": "random", "image_size": 32, "trigger": 8}


class Target(nn.Module):
    """What lies behind the black box: colours to two logits. It notes whether it was asked for gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.asked: list[bool] = []

    def forward(self, image: Tensor) -> np.ndarray:
        self.asked.append(torch.is_grad_enabled() or image.requires_grad)
        return self.layer(image.square().mean((2, 3))).detach().numpy()


def model(target: Target | None = None, **changes) -> Adapted:
    torch.manual_seed(0)
    box = BlackBox(3, model=target or Target(), classes=2, image_size=32)
    method = BlackVIP(**{**SMALL, "encoder_args": ENCODER, **changes})
    return adapt(box, method, head=Logits(2, 2))


def coordinator(adapted: Adapted) -> Coordinator:
    return next(iter(adapted.bank["default"].values()))  # type: ignore[call-overload]


def task(target: Target | None = None, repeats: int = 2, **changes) -> Classification:
    data = GeneratedImages(count=6, classes=("disc", "stripes"), side=32, crop=1.0, batch_size=4)
    found = Classification(model(target, **changes), data, SPSA(repeats=repeats))
    found.data = data  # type: ignore[assignment]
    return found


def train(made: Classification, output: Path, epochs: int = 2, **more):
    torch.manual_seed(3)
    return fit(made, made.data, Engine(epochs=epochs, device="cpu"), output, **more)


# -- the decoder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [(1568, 9_920), (784, 9_136), (3136, 11_488)])
def test_counts_of_the_published_decoders(size, count):
    with torch.device("meta"):
        decoder = Decoder(768, size - 768)
        assert sum(p.numel() for p in decoder.parameters()) == count
        assert decoder(torch.empty(2, 768)).shape == (2, 3, 224, 224)


def test_the_tensors_have_the_published_names_and_starts():
    decoder = Decoder(768, 800)
    state = decoder.state_dict()
    assert state["p_trigger"].shape == (1, 800)
    assert 0 <= float(state["p_trigger"].min()) < 0.01
    assert 0.09 < float(state["p_trigger"].max()) <= 0.1
    convolutions = {f"body.{i}.weight" for i in (0, 1, 4, 5, 8, 9, 12, 13, 16)} | {
        f"body.{i}.bias" for i in (0, 4, 8, 12)
    }
    norms = {name for name in state if name.split(".")[1:2] and name.split(".")[1] in ("2", "6", "10", "14")}
    assert state.keys() == {"p_trigger"} | convolutions | norms
    assert len(norms) == 4 * 5
    assert state["body.0.weight"].shape == (32, 2, 2, 2)
    assert state["body.16.weight"].shape == (16, 3, 2, 2)


def test_vectors_that_fill_no_cube_are_refused_with_those_that_would():
    with pytest.raises(RequestError, match=r"trigger 801 beside 768 features: .* as 16, 800, 2368 would be"):
        Decoder(768, 801)
    with pytest.raises(RequestError, match="trigger 0 beside 784"):
        Decoder(784, 0)
    with pytest.raises(RequestError, match="image_size 100: use a multiple of 32"):
        BlackVIP(image_size=100)


def test_batch_statistics_in_training_running_ones_in_inference():
    adapter, image = coordinator(model()), torch.randn(4, 3, 32, 32)
    adapter.eval()
    with torch.no_grad():
        alone, together = adapter.prompted(image[:1]), adapter.prompted(image)
        assert torch.equal(adapter.prompted(image), together)
        assert torch.allclose(alone, together[:1], atol=1e-5)
        adapter.train()
        before = adapter.decoder.body[2].running_mean.clone()
        alone, together = adapter.prompted(image[:2]), adapter.prompted(image)
        assert not torch.allclose(alone, together[:2], atol=1e-3)
        assert not torch.equal(adapter.decoder.body[2].running_mean, before)


# -- the prompted image --------------------------------------------------------------------------------------------


def test_the_range_of_pixels_is_clips():
    adapter = coordinator(model())
    assert adapter.low.flatten().tolist() == pytest.approx([-1.79226253, -1.75209713, -1.48021977], abs=1e-6)
    assert adapter.high.flatten().tolist() == pytest.approx([1.93033625, 2.07488384, 2.14589699], abs=1e-6)
    image = torch.randn(2, 3, 32, 32) * 3
    with torch.no_grad():
        painted = adapter.eval().prompted(image)
        free = image + adapter.decoder(adapter.encoder(image))
    inside = (free > adapter.low) & (free < adapter.high)
    assert torch.equal(painted[inside], free[inside])
    assert bool(((painted == adapter.low) | (painted == adapter.high))[~inside].all())
    assert 0.1 < float(inside.float().mean()) < 1


def test_without_strength_the_answers_are_those_of_the_bare_model():
    bare = model(eps=0.3)
    image = torch.rand(3, 3, 32, 32)  # within the range of pixels
    with bare.disabled():
        wanted = bare(image)
    adapter = coordinator(bare)
    assert not torch.equal(bare.eval()(image), wanted)
    adapter.eps = 0.0
    assert torch.equal(bare(image), wanted)
    with pytest.raises(WorkError, match="does not change the output, which gives no gradient either at model"):
        model(eps=0.0)


def test_the_encoder_gives_the_class_token_before_the_last_norm():
    adapter, image = coordinator(model()), torch.randn(2, 3, 32, 32)
    library = adapter.encoder.backbone.model
    tokens = library.forward_intermediates(image, indices=1, norm=False, return_prefix_tokens=True)[1][0][1]
    assert torch.allclose(adapter.encoder(image), tokens[:, 0], atol=1e-6)
    assert not any("encoder" in name for name in adapter.state_dict())


def test_in_training_the_encoder_reads_a_batch_once():
    adapter, calls = coordinator(model()), []
    adapter.encoder.register_forward_hook(lambda *_: calls.append(1))
    adapter.train()
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        first, again = adapter.prompted(image), adapter.prompted(image)
        assert torch.equal(first, again)
        assert len(calls) == 1
        image.add_(1)  # another content in the same tensor
        assert not torch.equal(adapter.prompted(image), first)
        adapter.prompted(image.clone())
    assert len(calls) == 3
    assert adapter.eval()._seen is None


def test_an_image_of_another_size_is_refused():
    with pytest.raises(RequestError, match="paints 32 x 32 pixels, the image has 64 x 64"):
        model()(torch.randn(1, 3, 64, 64))


# -- training ------------------------------------------------------------------------------------------------------


def test_a_step_asks_twice_the_repeats_without_gradients_and_leaves_the_target(tmp_path):
    target = Target()
    made = task(target, repeats=3)
    weights = {n: t.clone() for n, t in target.state_dict().items()}
    encoder = {n: t.clone() for n, t in coordinator(made.model).encoder.state_dict().items()}
    decoder = {n: p.detach().clone() for n, p in made.model.trainable().items()}
    proof = len(target.asked)
    found = train(made, tmp_path, epochs=1)
    batches, checks = len(made.data.train()), len(made.data.validation())
    assert found["cost"]["model_calls"] == 6 * batches + checks
    assert found["cost"]["model_images"] == 6 * len(made.data.train().dataset) + len(made.data.validation().dataset)
    assert len(target.asked) - proof == 6 * batches + checks + len(made.data.test())
    assert not any(target.asked)
    assert all(torch.equal(t, weights[n]) for n, t in target.state_dict().items())
    assert all(torch.equal(t, encoder[n]) for n, t in coordinator(made.model).encoder.state_dict().items())
    assert all(p.grad is None for m in (target, coordinator(made.model).encoder) for p in m.parameters())
    assert all(not torch.equal(p, decoder[n]) for n, p in made.model.trainable().items())


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole = train(task(), tmp_path / "whole", epochs=3)
    with pytest.raises(Interrupted):
        train(interrupt(task(), epoch=2), tmp_path / "parts", epochs=3)
    parts = train(task(), tmp_path / "parts", epochs=3, resume=True)
    ours, theirs = (checkpoint(tmp_path / name) for name in ("parts", "whole"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert same(ours[part], theirs[part]), part
    assert parts["test"] == whole["test"]
    assert parts["cost"]["model_calls"] == whole["cost"]["model_calls"]


def test_gradients_are_not_to_be_had_here(tmp_path):
    made = task()
    made.optimiser = Optimiser()
    with pytest.raises(RequestError, match="black box Target gives no gradient to train by: use optimiser.type SPSA"):
        train(made, tmp_path)


def test_a_file_is_for_one_encoder(tmp_path):
    first = model()
    first.save(tmp_path / "a.safetensors")
    again = model()
    again.load(tmp_path / "a.safetensors")
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(image), first.eval()(image))
    other = model()
    with torch.no_grad():
        next(coordinator(other).encoder.parameters()).add_(1)
    with pytest.raises(RequestError, match="a.safetensors: made with other"):
        other.load(tmp_path / "a.safetensors")


def test_what_the_encoder_lacks_is_told_in_the_methods_words():
    with pytest.raises(RequestError, match="its encoder: .*method.encoder_checkpoint=FILE|its encoder: .*no such file"):
        model(encoder_weights="pretrained", encoder_checkpoint="absent.safetensors")
    with pytest.raises(RequestError, match="encoder_args"):
        model(encoder_args={"colour": 1})
    box = BlackBox(
        1, model=lambda image: image.mean((2, 3)).repeat(1, 2), classes=2, image_size=32, mean=[0], std=[255]
    )
    grey = adapt(box, BlackVIP(**SMALL, encoder_args=ENCODER))
    assert grey(torch.rand(2, 1, 32, 32)).summary.shape == (2, 2)
    json.dumps(grey.methods["default"].arguments())


# -- a ResNet as the encoder -----------------------------------------------------------------------------------------

SMALL_RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 12, 16, 20)}


def test_published_counts_with_resnet_50() -> None:
    decoder = Decoder(2048, 3136 - 2048, groups=32)
    assert sum(p.numel() for p in decoder.parameters()) == 10_464
    assert decoder(torch.randn(2, 2048)).shape == (2, 3, 224, 224)
    assert sum(p.numel() for p in Decoder(768, 3136 - 768).parameters()) == 11_488


def test_a_resnet_says_what_the_image_shows_and_stays_frozen() -> None:
    changes = {"encoder": "resnet18", "encoder_args": {"model_args": SMALL_RESNET}, "trigger": 44}
    made = coordinator(model(**changes, groups=32))
    made.eval()
    image = torch.rand(3, 3, 32, 32)
    z = made.encoder(image)
    assert z.shape == (3, 20)
    backbone = made.encoder.backbone
    assert torch.equal(z, backbone.model.forward_features(image).mean((2, 3)))
    expected = torch.minimum(torch.maximum(image + made.decoder(z), made.low), made.high)
    assert torch.equal(made.prompted(image), expected)
    assert not any(p.requires_grad for p in made.encoder.parameters())
    adapted = model(**changes, groups=32)
    assert adapted.count()["adapter"] == 44 + 8928 + 64 * 3 + 256
    with pytest.raises(RequestError, match="groups 24: use a divisor of the cube's 64 channels and of 64"):
        model(**changes, groups=24)
    with pytest.raises(RequestError, match="its encoder: resnet19: no ResNet of timm"):
        model(**{**changes, "encoder": "resnet19"})


def test_a_resnet_takes_a_file_by_torchvisions_names(tmp_path: Path) -> None:
    made = coordinator(model(encoder="resnet18", encoder_args={"model_args": SMALL_RESNET}, trigger=44))
    state = {n: t + 0.1 for n, t in made.encoder.backbone.model.state_dict().items() if t.is_floating_point()}
    torch.save(state, tmp_path / "dino.pth")
    arguments = {"encoder_weights": "pretrained", "encoder_checkpoint": str(tmp_path / "dino.pth")}
    again = coordinator(model(encoder="resnet18", encoder_args={"model_args": SMALL_RESNET}, trigger=44, **arguments))
    image = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.encoder.backbone.model.conv1.weight, state["conv1.weight"])
    assert not torch.equal(again.encoder(image), made.encoder(image))
