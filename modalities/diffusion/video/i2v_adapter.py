"""I2V-Adapter: a video model animates an image that stays its clean first frame (Guo et al., 2023).

Every spatial self-attention gets one more query and output projection, by which each frame looks at the first one; the
UNet and its motion modules stay as they are, so any personalised UNet can take them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modalities.diffusion.backbones.unet_sites import unet_sites
from shared.adapted import Adapted
from shared.adapter import Adapter
from shared.backbone import Backbone
from shared.errors import RequestError
from shared.method import Method
from shared.sites import Site, Sites
from shared.store import write_atomically
from shared.taxonomy import Record
from shared.weights import read


@dataclass(frozen=True, kw_only=True)
class I2VAdapter(Method):
    """Attention to the first frame beside every spatial self-attention, the identity at the start.

    Works on a ``MotionUNet``, on the UNet inside any AnimateDiff pipeline, which may then be called as ever, and on a
    UNet that sees single frames, whose calls name the number of frames: ``cross_attention_kwargs={"num_frames": F}``,
    or ``context={"frames": F}``. Rows are then (video, frame), the frames of a video one after the other.
    """

    record: ClassVar[Record] = Record(
        categories=("additive/adapter",), acts_on="attention states", form="parallel", mergeable="no",
        trains="0 if site.role == 'model' else 2 * site.module.inner_dim * site.module.query_dim + site.module.out_dim",
        modality="diffusion", spec="i2v_adapter",
    )  # fmt: skip

    def sites(self, sites: Sites) -> Sites:
        return sites.select("model") + sites.select("attention", tags="self")

    def build(self, site: Site) -> Adapter:
        return NumberOfFrames() if site.role == "model" else I2VAttention(site.module)

    def example(self) -> dict[str, Any]:
        return {"frames": 1}  # where the UNet's own example has no frames


class NumberOfFrames(Adapter):
    """Around the whole UNet: tells the others how many frames the videos of a call have."""

    additive = True  # it adds nothing, whatever the strength of the others

    def part(self, strength: float, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self(base, *args, **kwargs)

    def forward(self, base: Callable[..., Any], sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """sample: (B, C, F, h, w), or (B * F, C, h, w) with the number of frames given beside."""
        told = vars(self.context)
        before = told.get("frames")
        given = dict(kwargs.get("cross_attention_kwargs") or {})
        if "num_frames" in given:  # diffusers' attention processors know no such word
            frames = int(given.pop("num_frames"))
            kwargs["cross_attention_kwargs"] = given or None
        else:
            frames = before
        frames = sample.shape[2] if sample.ndim == 5 else frames
        if not frames or (sample.ndim == 4 and len(sample) % frames):
            wrong = f"{len(sample)} rows are no videos of {frames} frames" if frames else "how many frames has a video"
            raise RequestError(f"I2VAdapter: {wrong}: give cross_attention_kwargs={{'num_frames': F}} by name")
        told["frames"] = frames
        try:
            return base(sample, *args, **kwargs)
        finally:
            if before is None:
                told.pop("frames", None)
            else:
                told["frames"] = before


class I2VAttention(Adapter):
    """Beside a frozen self-attention: each frame's own queries on the first frame's keys and values.

    ``out = W_o Attn(W_q x, W_k x, W_v x) + b_o + W_o' Attn(W_q' x, W_k x_first, W_v x_first) + b_o'``; W_q' starts as
    W_q, W_o' and b_o' as zero. W_k and W_v are the frozen layers, with whatever is on them.
    """

    additive = True
    host: Any

    def __init__(self, host: Any):
        super().__init__()
        weight = getattr(host.to_q, "base_layer", host.to_q)._parameters["weight"]  # as stored, whatever is on it
        inner, width = weight.shape
        self.to_q_ff = nn.Linear(width, inner, bias=False)
        self.to_out_ff = nn.Linear(inner, host.out_dim)
        with torch.no_grad():
            self.to_q_ff.weight.copy_(weight)
            nn.init.zeros_(self.to_out_ff.weight)
            nn.init.zeros_(self.to_out_ff.bias)
        self.__dict__["host"] = host  # not a submodule: it is the backbone's

    def forward(self, base: Callable[..., Tensor], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states: (B * F, tokens, width)."""
        own = base(hidden_states, *args, **kwargs)
        return own + self.beside(hidden_states).to(own.dtype)

    def beside(self, x: Tensor) -> Tensor:
        """What the branch adds, (B * F, tokens, width): all frames of a video are queries on one set of keys."""
        frames, host = self.context.frames, self.host
        x = x.to(self.to_q_ff.weight.dtype)
        first = x.unflatten(0, (-1, frames))[:, 0]
        key, value = (layer(first.to(next(layer.parameters()).dtype)).to(x.dtype) for layer in (host.to_k, host.to_v))
        query = self.to_q_ff(x).unflatten(0, (-1, frames)).flatten(1, 2)
        query, key, value = (t.unflatten(2, (host.heads, -1)).transpose(1, 2) for t in (query, key, value))
        found = F.scaled_dot_product_attention(query, key, value, scale=host.scale)
        return self.to_out_ff(found.transpose(1, 2).flatten(2).unflatten(1, (frames, -1)).flatten(0, 1))


# -- the official file -------------------------------------------------------------------------------------------------

_KEY = re.compile(
    r"(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+\.transformer_blocks\.\d+\.attn1\."
    r"(?:to_q_ff\.weight|to_out_ff\.(?:weight|bias))"
)


def is_official(tensors: Mapping[str, Any]) -> bool:
    """Whether these names are of an I2V-Adapter."""
    return any(_KEY.fullmatch(name) for name in tensors)


def official_names(sites: Sites) -> dict[str, tuple[Site, str]]:
    """The official key of every tensor of these sites, with the site and the tensor's name there: the UNet's own."""
    names = {}
    for site in sites:
        if site.role == "attention":
            path = site.path[re.search(r"down_blocks|mid_block|up_blocks", site.path).start() :]  # type: ignore[union-attr]
            parts = ("to_q_ff.weight", "to_out_ff.weight", "to_out_ff.bias")
            names |= {f"{path}.{part}": (site, part) for part in parts}
    return names


def load_official(
    target: nn.Module,
    path: str | os.PathLike,
    *,
    name: str = "i2v_adapter",
    example: Sequence[Any] | None = None,
) -> Adapted:
    """Attach a released I2V-Adapter, a .pth or .safetensors file with 48 tensors for Stable Diffusion 1.5.

    target: a diffusers UNet (``pipeline.unet``), a backbone around one, or a model adapted already, which gets one more
    adapter.  example: inputs for the proof of effect; a backbone brings its own.

    Raises RequestError where the file is none, has a key that is not used, lacks one, or is for another UNet. The
    target is unchanged then.
    """
    given = {key.replace(".attn1.processor.", ".attn1."): tensor for key, tensor in read(Path(path)).items()}
    if not is_official(given):
        raise RequestError(f"{path}: no I2V-Adapter: no key ends in attn1.to_q_ff.weight (first: {next(iter(given))})")
    method = I2VAdapter()
    sites = target.sites() if isinstance(target, Adapted | Backbone) else unet_sites(target)
    names = official_names(method.sites(sites))
    _check_fit(given, names, f"{path}: made for another UNet than this {sites.owner}")
    model = target if isinstance(target, Adapted) else Adapted(target, sites=sites)
    model.add(method, name=name, example=example)
    with torch.no_grad():
        for key, tensor in given.items():
            site, part = names[key]
            model.bank[name][site.key].get_parameter(part).copy_(tensor)  # type: ignore[index]
    return model


def save_official(model: Adapted, path: str | os.PathLike, *, name: str | None = None) -> None:
    """Write an I2V-Adapter with the official names, as .safetensors.

    name: which adapter; None means the only I2VAdapter of the model.
    Raises RequestError where there is none of that name, or the file's name ends otherwise.
    """
    from safetensors.torch import save

    adapters = [n for n, method in model.methods.items() if isinstance(method, I2VAdapter)]
    name = adapters[0] if name is None and len(adapters) == 1 else name
    if name not in adapters:
        raise RequestError(f"name one of the I2VAdapters to save; loaded: {', '.join(adapters) or 'none'}")
    if Path(path).suffix != ".safetensors":
        raise RequestError(f"{path}: use a name that ends in .safetensors")
    bank: Any = model.bank[name]
    tensors = {
        key: bank[site.key].get_parameter(part).detach().cpu().contiguous()
        for key, (site, part) in official_names(model.methods[name].sites(model.sites()) or Sites(())).items()
    }
    write_atomically(Path(path), save(tensors))


def _check_fit(given: Mapping[str, Tensor], names: Mapping[str, tuple[Site, str]], problem: str) -> None:
    """Every key used, every tensor there, every shape right."""

    def shape(site: Site, part: str) -> tuple[int, ...]:
        host: Any = site.module
        sizes = {"to_q_ff.weight": (host.inner_dim, host.query_dim), "to_out_ff.weight": (host.out_dim, host.inner_dim)}
        return sizes.get(part, (host.out_dim,))

    extra = sorted(given.keys() - names.keys())
    lacking = [key for key in names if key not in given]
    wrong = [key for key in names if key in given and tuple(given[key].shape) != shape(*names[key])]
    found = [f"{len(extra)} of its {len(given)} keys not used (first: {extra[0]})"] if extra else []
    found += [f"{len(lacking)} missing (first: {lacking[0]})"] if lacking else []
    if wrong:
        sizes = f"{tuple(given[wrong[0]].shape)}, here {shape(*names[wrong[0]])}"
        found += [f"{len(wrong)} of another shape (first: {wrong[0]} {sizes})"]
    if found:
        raise RequestError(f"{problem}: {', '.join(found)}")
