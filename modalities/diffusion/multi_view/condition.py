"""What an MV-Adapter is told with a call of the UNet, and what it makes of control maps and reference images."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shared.adapter import Adapter
from shared.context import Context
from shared.errors import RequestError

STEPS = 1000  # of the training schedule
WANTED: dict[str, Any] = {
    "num_views": 1,  # images in a row that show one object; not told, each stands alone
    "mv_scale": 1.0,  # of the attention between views
    "ref_scale": 1.0,  # of the attention to the reference
    "use_mv": True,
    "use_ref": True,
    "control": None,  # maps (r, 6, H, W) in 0 to 1 at image size, or (r, 6, 1, 1) alike everywhere; or features of them
    "control_scale": 1.0,
    "control_factor": 1.0,  # the encoder acts in this first share of the schedule
    "ref_latents": None,  # (prompts, C, h, w): one reference for each prompt, scaled as latents are, without noise
    "ref_hidden_states": None,  # in place of these: inputs of the self-attentions by name, (r, tokens, channels)
    "cache_hidden_states": None,  # a dictionary that takes these inputs in this call
}
_RESIDUALS = (
    "down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals",
)  # fmt: skip


def condition_encoder(unet: Any, vae_factor: int) -> nn.Module:
    """The encoder of six-channel maps that fits a UNet: diffusers' ``T2IAdapter``, as published for SDXL or SD2.1."""
    channels, kinds = list(unet.config.block_out_channels), list(unet.config.down_block_types)
    attends = [kind.startswith("CrossAttn") for kind in kinds]
    blocks = unet.config.layers_per_block
    if attends == [False, True, True]:
        return t2i_adapter("full_adapter_xl", [*channels, channels[-1]], blocks, 2 * vae_factor)
    if all(attends[:-1]) and isinstance(blocks, int):
        return t2i_adapter("full_adapter", channels, blocks, vae_factor)
    raise RequestError(f"no published encoder fits down blocks {', '.join(kinds)}: set condition: false")


def control_factor(timesteps: Tensor, share: float) -> float:
    """The ``control_factor`` with which the encoder acts in exactly the first ``int(steps * share)`` of a sampler's
    falling timesteps; for evenly spaced ones it is the share itself."""
    count = int(len(timesteps) * share)
    return 1 - float(timesteps[count - 1]) / STEPS if count else -1.0


def t2i_adapter(kind: str, channels: list[int], blocks: int, factor: int) -> nn.Module:
    from diffusers.models.adapter import T2IAdapter

    return T2IAdapter(6, channels, blocks, factor, kind)


class Conditioning(Adapter):
    """Around the UNet: takes what is wanted out of the call, encodes control maps, and looks at the reference."""

    def __init__(self, unet: Any, encoder: nn.Module | None, factor: int, reference: bool):
        super().__init__()
        kind = getattr(type(unet), "_host_of", type(unet))
        self.names = tuple(inspect.signature(kind.forward).parameters)[1:]
        self.encoder, self.factor, self.reference = encoder, factor, reference
        self._kept: _Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(self.names, args, strict=False)) | kwargs
        given = dict(call.pop("cross_attention_kwargs", None) or {})
        told = {n: v for n, v in vars(self.context).items() if n in WANTED}
        told = WANTED | told | {n: given.pop(n) for n in WANTED if n in given}
        if given:
            call["cross_attention_kwargs"] = given
        told["latent_size"] = tuple(call["sample"].shape[-2:])
        if not isinstance(told["num_views"], int) or told["num_views"] < 1:
            raise RequestError(f"num_views {told['num_views']!r}: a whole number from 1")
        self._check(told)
        maps, latents = told["control"], told["ref_latents"]
        told |= {"control": None, "ref_latents": None}  # nobody further in shall take them again
        with _telling(self.context, told):
            features, told["ref_hidden_states"] = self._prepared(base, call, told, maps, latents)
        if features:
            ours = [_repeated(told["control_scale"] * f, len(call["sample"])).to(call["sample"]) for f in features]
            theirs = call.get("down_intrablock_additional_residuals")
            call["down_intrablock_additional_residuals"] = (
                [a + b for a, b in zip(ours, theirs, strict=True)] if theirs else ours
            )
        with _telling(self.context, told):
            return base(**call)

    def _check(self, told: dict[str, Any]) -> None:
        if told["control"] is not None and self.encoder is None:
            raise RequestError("control maps were given, but this adapter has no encoder (condition: false)")
        if not self.reference and (told["ref_latents"] is not None or told["ref_hidden_states"] is not None):
            raise RequestError("a reference was given, but this adapter has no branch for it (reference: false)")

    def _prepared(self, base: Any, call: Any, told: Any, maps: Any, latents: Any) -> tuple[Any, Any]:
        """The features of the maps, and the reference's hidden states; made once for all steps of a sampler."""
        if not told["use_ref"]:
            latents = None
        if maps is None and latents is None:
            return None, told["ref_hidden_states"]
        timestep = float(torch.as_tensor(call["timestep"]).max())
        if timestep < STEPS * (1 - told["control_factor"]):
            maps = None
        tensors = (maps, latents, call.get("encoder_hidden_states"))
        facts = (call["sample"].shape, told["num_views"])
        keeps = not torch.is_grad_enabled() and all(t is None or _is_watched(t) for t in tensors)
        if keeps and self._kept is not None and self._kept.holds(tensors, facts, timestep):
            return self._kept.value
        features = None if maps is None else self._features(maps, told["latent_size"])
        states = told["ref_hidden_states"] if latents is None else self._look(base, call, latents, told["num_views"])
        if self._kept is not None:
            self._kept.drop()
        self._kept = _Kept((features, states), tensors, facts, timestep) if keeps else None
        return features, states

    def _features(self, maps: Any, size: tuple[int, int]) -> list[Tensor]:
        if not isinstance(maps, Tensor):
            return list(maps)
        encoder: Any = self.encoder
        height, width = (self.factor * side for side in size)
        if maps.shape[2:] == (1, 1):
            maps = maps.expand(-1, -1, height, width)
        if maps.shape[1:] != (6, height, width):
            have = "x".join(map(str, maps.shape[1:]))
            raise RequestError(f"control maps of {have}: latents of {size[0]}x{size[1]} want 6x{height}x{width}")
        if height % encoder.downscale_factor or width % encoder.downscale_factor:
            raise RequestError(
                f"control maps of {height}x{width}: sides must be multiples of {encoder.downscale_factor}"
            )
        weight = next(encoder.parameters())
        return encoder(maps.to(weight))

    @torch.no_grad()
    def _look(self, base: Any, call: Any, latents: Tensor, views: int) -> dict[str, Tensor]:
        """What goes into the self-attentions for the reference: timestep 0, the prompt's text, no other view.

        With guidance the unconditional half sees zeros.
        """
        sample = call["sample"]
        latents = latents.to(sample).expand(-1, *sample.shape[1:]) if latents.shape[1:] == (1, 1, 1) else latents
        prompts, images = len(latents), len(latents) * views
        if len(sample) not in (images, 2 * images):
            raise RequestError(
                f"ref_latents of {prompts} rows and num_views {views}: a batch of {images}, or of {2 * images} with "
                f"guidance, is expected, not {len(sample)}"
            )

        def conditional(value: Any) -> Any:
            """The rows of a prompt's first view, in the conditional half."""
            if isinstance(value, Tensor) and value.ndim and len(value) == len(sample):
                return value[len(sample) - images :: views]
            if isinstance(value, dict):
                return {key: conditional(each) for key, each in value.items()}
            return [conditional(each) for each in value] if isinstance(value, list | tuple) else value

        asked = {n: conditional(v) for n, v in call.items() if n not in ("sample", "timestep", *_RESIDUALS)}
        zero = torch.zeros((), dtype=torch.long, device=sample.device)
        cache: dict[str, Tensor] = {}
        quiet = {"use_mv": False, "use_ref": False, "cache_hidden_states": cache}
        with _telling(self.context, quiet):
            base(**asked, sample=latents.to(sample), timestep=zero)
        guided = len(sample) == 2 * images
        return {n: torch.cat([torch.zeros_like(t), t]) if guided else t for n, t in cache.items()}


class _Kept:
    """What was made of tensors, while the very same come again at falling timesteps and nobody wants a gradient."""

    def __init__(self, value: tuple[Any, Any], tensors: Sequence[Tensor | None], facts: tuple, timestep: float):
        self.value, self.facts, self.timestep = value, facts, timestep
        self.marks = [None if t is None else (weakref.ref(t, self.drop), t._version) for t in tensors]

    def drop(self, _: Any = None) -> None:
        self.value = (None, None)
        self.facts = ()

    def holds(self, tensors: Sequence[Tensor | None], facts: tuple, timestep: float) -> bool:
        falling, self.timestep = timestep <= self.timestep, timestep
        return falling and facts == self.facts and all(map(self._same, self.marks, tensors))

    @staticmethod
    def _same(mark: Any, tensor: Tensor | None) -> bool:
        if mark is None or tensor is None:
            return mark is None and tensor is None
        return mark[0]() is tensor and mark[1] == tensor._version


def _is_watched(value: Any) -> bool:
    """Whether a change of it would be seen."""
    return isinstance(value, Tensor) and not value.is_inference() and not torch.compiler.is_compiling()


def _repeated(rows: Tensor, batch: int) -> Tensor:
    if batch % len(rows):
        raise RequestError(f"control of {len(rows)} rows does not go into a batch of {batch}: give one for each view")
    return rows.repeat(batch // len(rows), *(1,) * (rows.ndim - 1))


@contextlib.contextmanager
def _telling(context: Context, values: dict[str, Any]) -> Iterator[None]:
    """Within the block the context holds these values too; then it is as it was."""
    before = dict(vars(context))
    vars(context).update(values)
    try:
        yield
    finally:
        vars(context).clear()
        vars(context).update(before)
