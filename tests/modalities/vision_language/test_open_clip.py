"""OpenClip: open_clip's own numbers from both towers, sites told apart by tower, weights strictly."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from modalities.vision_language.backbones import OpenClip
from shared import adapt
from shared.errors import RequestError
from shared.methods import LoRA, Prompt
from tests.modalities.vision_language.clips import SMALL, clip, written

LINEAR = ("attention.query", "attention.key", "attention.value", "attention.output", "mlp.up", "mlp.down")
TEXTS = ["a photo of a disc", "stripes", "a drawing of 3 crosses, seen from above"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Any, dict[str, Any]]:
    return written(tmp_path_factory.mktemp("open_clip"))


def test_a_checkpoint_gives_open_clips_embeddings_and_logits_bit_for_bit(pair):
    theirs, settings = pair
    ours, image = OpenClip(3, **settings).eval(), torch.randn(4, 3, 32, 32)
    tokens = ours.tokens(TEXTS)
    assert torch.equal(tokens, open_clip.SimpleTokenizer()(TEXTS, context_length=20))
    with torch.no_grad():
        found = ours(image, tokens)
        assert torch.equal(found.image, theirs.encode_image(image, normalize=True))
        assert torch.equal(found.text, theirs.encode_text(tokens, normalize=True))
        assert torch.equal(found.scale * found.image @ found.text.T, theirs.get_logits(image, tokens)[0])
        assert found.patches is None
        assert ours(None, found.text).text is found.text
    assert found.scale.shape == (4, 1)
    assert ours.source == f"file: {settings['checkpoint']}"


def test_patches_are_the_librarys_last_tokens_projected(pair):
    theirs, settings = pair
    ours, image = OpenClip(3, **settings).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        patches = ours(image, dense=True).patches
        last = theirs.visual.forward_intermediates(image, indices=1, normalize_intermediates=True)
        tokens = last["image_intermediates"][0].flatten(2).transpose(1, 2) @ theirs.visual.proj
    expected = nn.functional.normalize(tokens, dim=-1).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(patches, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {n: t for n, t in s.items() if n != "ln_final.weight"}, r"1 missing \(ln_final.weight\)"),
        (lambda s: {n: t for n, t in s.items() if n != "logit_scale"}, "holds no logit_scale"),
        (lambda s: {n: t for n, t in s.items() if n.startswith("visual.")}, "holds no logit_scale"),
        (lambda s: s | {"logit_bias": torch.zeros(())}, r"1 unexpected \(logit_bias\)"),
    ],
)
def test_a_file_that_does_not_fit_says_what_is_wrong(change, message, pair, tmp_path):
    torch.save(change(torch.load(pair[1]["checkpoint"])), tmp_path / "wrong.pth")
    with pytest.raises(RequestError, match=message):
        OpenClip(3, name="tiny-both", checkpoint=str(tmp_path / "wrong.pth"))


def test_the_layout_with_a_text_tower_of_its_own_name_loads_too(pair, tmp_path):
    theirs, settings = pair
    state = torch.load(settings["checkpoint"])
    whole = {n if n.startswith(("visual.", "logit")) else f"text.{n}": t for n, t in state.items()}
    torch.save(whole, tmp_path / "custom.pth")
    ours = OpenClip(3, name="tiny-both", checkpoint=str(tmp_path / "custom.pth"))
    assert torch.equal(ours.text.text_projection, theirs.text_projection)
    assert ours.logit_scale.item() == 2.5


def test_sites_of_both_towers_are_what_they_say_and_every_adapter_acts():
    backbone = clip()
    sites = backbone.sites()
    assert all(backbone.get_submodule(site.path) is site.module for site in sites)
    assert len({site.key for site in sites}) == len(sites)
    for tower, blocks in (("image", 3), ("text", 2)):
        assert [len(sites.select(role, tags=tower)) for role in LINEAR] == [blocks] * 6
        assert len(sites.select("norm", tags=(tower, "final"))) == 2
    assert {site.path.partition(".")[0] for site in sites.select("block")} == {"image"}
    assert len(sites.select("embedding", tags="text")) == 1
    model = adapt(backbone, LoRA(rank=2, roles=LINEAR))  # ends with the proof that every adapter acts
    assert len(list(model.bank["default"].children())) == 6 * 5


@pytest.mark.parametrize("tower", ["image", "text"])
def test_adapters_of_one_tower_leave_the_other_as_it_was_bit_for_bit(tower):
    backbone, image = clip(towers=tower), torch.randn(2, 3, 32, 32)
    tokens = backbone.tokens(TEXTS)
    model = adapt(backbone, LoRA(rank=2, roles=LINEAR))
    with torch.no_grad(), model.disabled():
        before = model(image, tokens)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
        after = model(image, tokens)
    changed = {name for name in ("image", "text") if not torch.equal(getattr(before, name), getattr(after, name))}
    assert changed == {tower}
    assert (getattr(before, tower) - getattr(after, tower)).abs().max() > 1e-3


def test_later_words_do_not_reach_earlier_ones_with_adapters_in_the_text_tower():
    model = adapt(clip(towers="text"), LoRA(rank=2, roles=LINEAR))
    backbone: Any = model.backbone
    tokens = backbone.tokens(["a photo of a disc", "a photo of a cross"])  # alike up to the last word
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
        seen: list[torch.Tensor] = []
        hook = backbone.text.ln_final.register_forward_hook(lambda module, args, out: seen.append(out))
        model(None, tokens)
        hook.remove()
    torch.testing.assert_close(seen[0][0, :5], seen[0][1, :5])
    assert (seen[0][0, 5] - seen[0][1, 5]).abs().max() > 1e-3


def test_image_prompts_go_into_the_image_tower_alone():
    model = adapt(clip(), Prompt(count=2))
    assert model.count()["adapter"] == 3 * 2 * 48
    with pytest.raises(RequestError, match="no site with role 'block'"):
        adapt(clip(towers="text"), Prompt(count=2))


def test_published_sizes_on_the_meta_device():
    with torch.device("meta"):
        backbone = OpenClip(3, name="ViT-B-32", pretrained="laion2b_s34b_b79k")
    assert sum(p.numel() for p in backbone.parameters()) == 151_277_313
    assert (backbone.summary_width, backbone.text.context_length) == (512, 77)
    options: Any
    for options, trained in (({"towers": "image"}, 12 * 2 * 8 * 2 * 768), ({"towers": "text"}, 12 * 2 * 8 * 2 * 512)):
        with torch.device("meta"):
            backbone = OpenClip(3, name="ViT-B-32", pretrained="random", **options)
            assert adapt(backbone, LoRA(rank=8)).count()["trainable"] == trained


def test_random_weights_come_from_the_seed_alone():
    first, again, other = clip(seed=3), clip(seed=3), clip(seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.text.token_embedding.weight, other.text.token_embedding.weight)
    assert repr(first) == "OpenClip(ViT-B-32, sites of both towers, context 20, weights: random (seed 3))"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"towers": "vision"}, "towers 'vision': use both, image or text"),
        ({"name": "roberta-ViT-B-32"}, "its text tower is not open_clip's TextTransformer"),
        ({"name": "coca_ViT-B-32"}, "pools by attention"),
        ({"name": "ViT-bigG-14-CLIPA", "pretrained": "random"}, "another tokenizer .hf_tokenizer_name."),
        ({"text_args": {"widht": 4}}, "text_args has no 'widht'; nearest: width"),
        ({"text_args": {"hf_model_name": "x"}}, "text_args has no 'hf_model_name'"),
        ({"text_args": {**SMALL["text_args"], "vocab_size": 99}}, "vocab_size 99: the tokenizer has 49408 words"),
        ({"text_args": {**SMALL["text_args"], "qk_norm": True}}, "only open_clip's default blocks"),
    ],
)
def test_wrong_requests_say_what_would_be_right(options, message):
    with pytest.raises(RequestError, match=message):
        clip(**options)


def test_texts_are_never_cut():
    backbone = clip()
    assert backbone.tokens(["word " * 18]).shape == (1, 20)
    with pytest.raises(RequestError, match=r"text 'word .*': 19 tokens, ViT-B-32 takes 18; shorten it"):
        backbone.tokens(["fine", "word " * 19])
    with pytest.raises(RequestError, match="text ' ' holds no word"):
        backbone.tokens([" "])
    with pytest.raises(RequestError, match=r"tokens must be \(N, 20\), got \(1, 77\)"):
        backbone(None, torch.zeros(1, 77, dtype=torch.long))
