"""Training on clips by masks and curriculum, and making clips: losses, resuming, every kind of request."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from modalities.diffusion.backbones.dfgn import DFGN, Clip
from modalities.diffusion.data import MovingDots
from modalities.diffusion.masks import TASKS
from modalities.diffusion.sampling import to_bytes
from modalities.diffusion.stickers.clip_encoders import Latents, Texts, words
from modalities.diffusion.stickers.denoising import StickerDenoising, hidden
from modalities.diffusion.stickers.sampling import denoise, given_frames
from shared import LoRA, adapt
from shared.backbone import Backbone
from shared.errors import RequestError
from shared.generating import Wanted
from shared.methods.full import Full
from shared.sites import Sites, describe
from shared.training import Engine, Optimiser, fit
from tests.modalities.diffusion.pipelines import save_pipeline
from tests.modalities.diffusion.test_dfgn import SMALL


class Blank(Backbone):
    """Any UNet that takes cat(noisy, condition): one convolution over pixels, which also remembers its calls."""

    def __init__(self, channels: int = 4, frames: int = 8):
        super().__init__("Blank")
        self.latent_channels, self.text_width, self.frames = channels, 16, frames
        self.mix, self.read = nn.Conv3d(2 * channels, channels, 1), nn.Linear(16, channels)
        self.seen: list[tuple[Tensor, ...]] = []

    def sites(self) -> Sites:
        return describe(self)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Clip:
        self.seen.append((sample.detach(), timestep, encoder_hidden_states))
        told = self.read(encoder_hidden_states.mean(1))
        return Clip(self.mix(sample) + told[:, :, None, None, None])

    def example(self) -> tuple[Any, ...]:
        shape = (1, 2 * self.latent_channels, self.frames, 4, 4)
        return torch.randn(shape), torch.tensor([5]), torch.randn(1, 3, 16)


def data(**more: Any) -> MovingDots:
    return MovingDots(**{"clips": 12, "checks": 3, "size": 8, "batch_size": 2, **more})


def blank(clips: Any = None, **more: Any) -> StickerDenoising:
    torch.manual_seed(0)
    return StickerDenoising(adapt(Blank(), Full()), clips or data(), Optimiser(learning_rate=1e-2), **more)


def make(task: StickerDenoising, **wanted: Any) -> Any:
    told: list[tuple[int, int]] = []
    made = task.generate(Wanted(**{"steps": 3, **wanted}), progress=lambda done, of: told.append((done, of)))
    steps = wanted.get("steps", 3)
    assert told == [(i + 1, steps) for i in range(steps)]
    return made


# -- training ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_masked_error_of_a_drawn_task():
    task, batch = blank(tasks=("it2v",), masked_words=0.0), next(iter(data().train()))
    random.seed(1)
    torch.manual_seed(1)
    loss = task.loss(batch)
    sample, steps, text = task.model.backbone.seen[-1]
    noisy, given = sample.chunk(2, dim=1)
    torch.manual_seed(1)
    assert torch.equal(steps, torch.randint(1000, (2,)))
    noise, real = torch.randn(noisy.shape), batch["frame_mask"][:, None, :, None, None]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = (1 - betas).cumprod(0)[steps][:, None, None, None, None]
    torch.testing.assert_close(noisy, kept.sqrt() * batch["clip"] + (1 - kept).sqrt() * noise)
    shown = given.abs().amax((0, 1, 3, 4)) > 0
    assert shown.sum() == 1
    place = int(shown.nonzero())
    assert place < batch["frame_mask"].sum(1).min()
    assert torch.equal(given[:, :, place], batch["clip"][:, :, place])
    assert torch.equal(text, words(batch["caption"], 16))
    with torch.no_grad():
        said = task.model.backbone(sample, steps, text).sample
    torch.testing.assert_close(loss, (real * (said - noise)).square().mean())


def test_without_text_the_tokens_are_zeros_and_without_frames_the_condition_is():
    batch = next(iter(data().train()))
    for name, text, given in (("i2v", False, True), ("t2v", True, False)):
        task = blank(tasks=(name,))
        task.loss(batch)
        sample, _, tokens = task.model.backbone.seen[-1]
        assert bool(tokens.any()) == text
        assert bool(sample[:, 4:].any()) == given


def test_words_are_hidden_as_often_as_asked():
    caption, draws = " ".join(["word"] * 2000), random.Random(0)
    assert hidden("a red dot", 0.0) == "a red dot"
    assert hidden("a red dot", 1.0) == "# # #"
    assert hidden(caption, 0.2, draws).count("#") == pytest.approx(400, abs=60)


def test_results_are_means_over_tasks_and_evaluations_repeat():
    task = blank()
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        with torch.no_grad():
            for batch in data().test():
                task.eval().evaluate(batch)
        found.append(task.results())
    assert found[0] == found[1]
    assert list(found[0]) == ["loss", *(f"loss/{name}" for name in TASKS)]
    assert found[0]["loss"] == pytest.approx(np.mean(list(found[0].values())[1:]))


def test_other_tasks_than_those_trained_are_evaluated_alike():
    """Trained on one task or on all, both are measured on the same clips, masks and noise."""
    found = []
    for more in ({"tasks": ("t2v",), "evaluated": ("t2v", "interpolation")}, {}):
        task = blank(**more)
        with torch.no_grad():
            for batch in data().test():
                task.eval().evaluate(batch)
        found.append(task.results())
        assert set(task.curriculum.families) == set(more.get("tasks", TASKS))
    alone, every = found
    assert list(alone) == ["loss", "loss/t2v", "loss/interpolation"]
    assert alone["loss/interpolation"] == every["loss/interpolation"] != every["loss/t2v"]
    assert alone["loss"] == pytest.approx((every["loss/t2v"] + every["loss/interpolation"]) / 2)


def test_a_run_learns_and_its_curriculum_follows_the_loss(tmp_path):
    task, clips = blank(curriculum_share=0.5), data()
    found = fit(task, clips, Engine(epochs=4, device="cpu"), tmp_path)
    assert task.curriculum.end == found["steps"] // 2 == 12
    assert len(task.curriculum.losses) == 24
    assert len(task.curriculum.signals) == 23
    rows = task.pictures(clips).rows
    assert [list(images) for _, images in rows] == [["clip", "given", "noisy", "denoised"]] * 3
    assert all(
        a.dtype == np.uint8 and a.shape[0] == 8 and a.shape[2] == 3 for _, images in rows for a in images.values()
    )


class Interrupted(Exception):
    pass


def test_resumed_is_as_if_never_interrupted(tmp_path):
    """The curriculum's losses, signals and level too, without which other tasks would be drawn."""
    engine = Engine(epochs=4, device="cpu", save_every=5)

    def run(folder: Path, stop: int | None, resume: bool, seed: int) -> StickerDenoising:
        torch.manual_seed(7)
        task = blank()
        plain = task.loss

        def loss(batch: Any) -> Tensor:
            if task.global_step == stop:
                raise Interrupted
            return plain(batch)

        task.loss = loss  # type: ignore[method-assign]
        torch.manual_seed(seed)
        fit(task, data(), engine, folder, resume=resume)
        return task

    whole = run(tmp_path / "whole", None, False, 7)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", 17, False, 7)
    parts = run(tmp_path / "parts", None, True, 99)
    assert parts.curriculum.state_dict() == whole.curriculum.state_dict()
    assert len(whole.curriculum.signals) == 23  # so the level was in force, before and after
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (tmp_path / "parts/metrics.csv").read_text() == (tmp_path / "whole/metrics.csv").read_text()


def test_the_network_trains_whole_or_by_an_adapter():
    batch = next(iter(data(size=4, batch_size=1).train()))
    task = StickerDenoising(adapt(DFGN(**SMALL), Full()), data(), Optimiser())
    task.loss(batch).backward()
    silent = {n for n, p in task.model.trainable().items() if p.grad is None}
    assert all("context_T5_clip_embedding" in name for name in silent)  # no T5 here
    few = StickerDenoising(adapt(DFGN(**SMALL), LoRA(rank=2)), data(), Optimiser())
    few.loss(batch).backward()
    trained = few.model.trainable()
    assert all(name.startswith("adapter.") and p.grad is not None for name, p in trained.items())


# -- generation --------------------------------------------------------------------------------------------------------


def test_ddim_takes_away_the_noise_a_perfect_model_tells():
    """A model that knows the clip: DDIM ends at it; padding is left out."""
    task = blank()
    clean = torch.from_numpy(np.random.default_rng(0).uniform(-0.9, 0.9, (4, 8, 8, 8)).astype(np.float32))
    kept = task.schedule.alphas_cumprod

    def told(sample: Tensor, step: Tensor, **text: Tensor) -> Clip:
        at = kept[step][:, None, None, None, None]
        real = (clean * (torch.arange(8) < 5)[:, None, None]).expand(len(sample), -1, -1, -1, -1)
        return Clip((sample[:, :4] - at.sqrt() * real) / (1 - at).sqrt())

    task.model.forward = told  # type: ignore[method-assign]
    made = make(task, steps=50, frames=5, count=2)
    assert [clip.shape for clip in made.images] == [(5, 8, 8, 4)] * 2
    for clip in made.images:
        assert np.abs(clip.astype(int) - to_bytes(clean[:, :5].transpose(0, 1))).max() <= 1
    assert made.kind == "frames"
    assert made.rate == 8.0
    assert made.settings["given"] == []
    assert made.settings["steps"] == 50


def test_clean_pixels_stay_in_their_range_and_latents_have_none():
    """A model that finds no noise takes the start for the clean clip, many times too great."""
    task, given, real = blank(), torch.zeros(1, 4, 8, 4, 4), torch.ones(1, 8)
    task.model.forward = lambda sample, step, **text: Clip(0 * sample[:, :4])  # type: ignore[method-assign]
    settings: dict[str, Any] = {"steps": 3, "guidance": 1.0, "seeds": [0], "progress": lambda done, of: None}
    assert denoise(task, given, real, {}, None, **settings).abs().max() <= 1
    task.latents.vae = object()
    assert denoise(task, given, real, {}, None, **settings).abs().max() > 10
    assert task.sampler.ddim(3, pixels=False).final_alpha_cumprod == task.schedule.alphas_cumprod[0]  # published


def test_text_guides_and_the_condition_is_the_same_for_both_halves(tmp_path):
    task = blank(negative="black")
    Image.new("RGBA", (8, 8), (255, 0, 0, 255)).save(tmp_path / "first.png")
    plain = make(task, prompt="a red dot", image=tmp_path / "first.png", guidance=1.0).images[0]
    task.model.backbone.seen.clear()
    made = make(task, prompt="a red dot", image=tmp_path / "first.png", guidance=5.0)
    assert not np.array_equal(made.images[0], plain)
    assert made.settings["negative"] == "black"
    for sample, _, tokens in task.model.backbone.seen:
        away, towards = sample.chunk(2)
        assert torch.equal(away, towards)
        assert torch.equal(tokens, words(["black", "a red dot"], 16))
        red = torch.tensor([1.0, -1.0, -1.0, 1.0])[:, None, None].expand(4, 8, 8)
        assert torch.equal(away[0, 4:, 0], red)
        assert (away[:, 4:, 1:] == 0).all()
    task.model.backbone.seen.clear()
    make(task, image=tmp_path / "first.png")  # no prompt: no text, nothing guides
    assert all(len(sample) == 1 and not tokens.any() for sample, _, tokens in task.model.backbone.seen)


def test_padding_stays_the_noised_zeros_of_training():
    task = blank()
    make(task, frames=3, seed=5)
    noise = torch.randn((1, 4, 8, 8, 8), generator=torch.Generator().manual_seed(5))
    for sample, step, _ in task.model.backbone.seen:
        away = (1 - task.schedule.alphas_cumprod[step]).sqrt()
        torch.testing.assert_close(sample[:, :4, 3:], away * noise[:, :, 3:])


def test_each_clip_has_a_seed_of_its_own_and_comes_again():
    task = blank(eta=1.0)
    three, second = make(task, count=3, seed=4).images, make(task, seed=5).images
    assert np.abs(three[1].astype(int) - second[0]).max() <= 1
    assert not np.array_equal(three[0], three[1])
    assert np.array_equal(make(task, count=3, seed=4).images[2], three[2])


def test_frames_are_given_anywhere(tmp_path):
    """Interpolation, prediction of what comes after, and of what came before, by the names in a folder."""
    task = blank()
    folder = tmp_path / "given"
    folder.mkdir()
    for place in (2, 0, 6):
        Image.new("RGB", (8, 8), (place * 40, 0, 0)).save(folder / f"frame_{place}.png")
    assert make(task, image=folder).settings["given"] == [0, 2, 6]
    sample = task.model.backbone.seen[-1][0]
    assert (sample[0, 4:].abs().amax((0, 2, 3)) > 0).tolist() == [True, False, True, False, False, False, True, False]
    assert sample[0, 4, 6, 0, 0].item() == pytest.approx(240 / 127.5 - 1)
    frames = [Image.new("RGB", (8, 8), (60 * i, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / "start.gif", save_all=True, append_images=frames[1:])
    assert sorted(given_frames(tmp_path / "start.gif", 8)) == [0, 1, 2]
    with pytest.raises(RequestError, match="start.gif: 3 frames are given; from 1 to 2 leave something to make"):
        make(task, image=tmp_path / "start.gif", frames=3)
    Image.new("RGB", (8, 8)).save(folder / "frame_8.png")
    with pytest.raises(RequestError, match="frame_8.png: its name must end in its place, .* from 0 to 7"):
        make(task, image=folder)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"views": 6}, "it takes neither views nor a mesh"),
        ({"frames": 9}, "frames 9: from 2 to 8, the frames it was trained with"),
        ({"size": (8, 12)}, "size 12x8: clips are square"),
        ({"count": 0}, "count 0 and steps 3"),
        ({"steps": 1001}, "steps 1001: at least 1, and from 1 to 1000"),
    ],
)
def test_what_it_does_not_make_is_said(wanted, message):
    with pytest.raises(RequestError, match=message):
        make(blank(), **wanted)


# -- what stands around it ---------------------------------------------------------------------------------------------


def test_words_are_vectors_of_their_own():
    found = words(["a red dot", "dot Red", ""], 16)
    assert found.shape == (3, 12, 16)
    assert torch.equal(found[0, 2], found[1, 0])
    assert torch.equal(found[0, 1], found[1, 1])
    assert not found[2].any()
    assert abs(torch.nn.functional.cosine_similarity(found[0, 1], found[0, 2], dim=0)) < 0.9


def test_latents_and_text_come_from_a_pipeline(tmp_path):
    folder = str(save_pipeline(tmp_path))
    latents, clip, real = Latents(folder), torch.rand(2, 3, 4, 16, 16) * 2 - 1, torch.ones(2, 4)
    real[1, 3] = 0
    found = latents.encode(clip, real, draw=False)
    assert found.shape == (2, 4, 4, 2, 2)
    assert not found[1, :, 3].any()
    vae = latents.vae
    with torch.no_grad():
        expected = vae.encode(clip[0, :, 2][None]).latent_dist.mode()[0] * vae.config.scaling_factor
        torch.testing.assert_close(found[0, :, 2], expected)
        torch.testing.assert_close(
            latents.decode(found)[0, :, 2], vae.decode(expected[None] / vae.config.scaling_factor).sample[0]
        )
    assert not torch.equal(latents.encode(clip, real, draw=True), latents.encode(clip, real, draw=True))
    assert not any(p.requires_grad for p in vae.parameters())
    texts = Texts(folder, None, (32, None))
    told = texts(["a cat", "dog"], torch.device("cpu"))
    assert told["encoder_hidden_states"].shape == (2, 77, 32)
    assert not torch.equal(*told["encoder_hidden_states"])
    with pytest.raises(RequestError, match="its tokens have 32 channels, the UNet takes 16"):
        Texts(folder, None, (16, None))
    with pytest.raises(RequestError, match="/nowhere: no vae to load"):
        Latents("/nowhere")


def test_a_t5_stands_beside(tmp_path):
    from transformers import T5Config, T5EncoderModel

    folder = save_pipeline(tmp_path)
    config = T5Config(vocab_size=514, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    for file in (folder / "tokenizer").iterdir():
        (tmp_path / "t5" / file.name).write_bytes(file.read_bytes())
    told = Texts(None, str(tmp_path / "t5"), (16, 12))(["a cat"], torch.device("cpu"))
    assert told["t5_hidden_states"].shape == (1, 77, 12)
    assert DFGN(**SMALL)(torch.randn(1, 8, 8, 4, 4), torch.tensor([5]), **told).sample.shape == (1, 4, 8, 4, 4)


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(RequestError, match="no task 'v2v'; there are i2v"):
        blank(tasks=("v2v",))
    with pytest.raises(RequestError, match="no task 'v2v'; there are i2v"):
        blank(evaluated=("v2v",))
    with pytest.raises(RequestError, match="the UNet takes 4 channels and 8 frames, the clips have 3 and 8"):
        blank(data(bands=3))
    with pytest.raises(RequestError, match="the UNet takes 4 channels and 8 frames, the clips have 4 and 6"):
        blank(data(frames=6, key_frames=(3, 6)))
    with pytest.raises(RequestError, match="clips need a video UNet .*, not Linear"):
        StickerDenoising(SimpleNamespace(backbone=nn.Linear(1, 1)), data(), Optimiser())  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="curriculum_share and masked_words are shares"):
        blank(curriculum_share=0.0)
    with pytest.raises(RequestError, match="eta 2 and guidance 9"):
        blank(eta=2.0)
    folder = str(save_pipeline(tmp_path))
    with pytest.raises(RequestError, match="the autoencoder takes 3 channels, sides by 8 pixels; the clips have 4"):
        blank(autoencoder=folder)
