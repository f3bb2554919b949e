"""The video UNet of AnimateDiff (Guo et al., 2023): a text-to-image UNet on every frame, with motion modules."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modalities.diffusion.backbones.content import attach_content, read_content
from modalities.diffusion.backbones.unet import CONFIGS, DiffusersUNet
from shared.errors import RequestError
from shared.weights import read

# What the published motion modules set beyond the defaults of diffusers' MotionAdapter, by the UNet's config.
# AnimateDiff's first version, which I2V-Adapter builds on: 24 positions, nothing in the middle block.
MOTION: dict[str, dict[str, Any]] = {
    "sd15": {"motion_max_seq_length": 24, "use_motion_mid_block": False},
    "tiny_sd15": {
        "block_out_channels": (8, 16, 16, 16),
        "motion_norm_num_groups": 4,
        "motion_num_attention_heads": 2,
        "motion_max_seq_length": 24,
        "use_motion_mid_block": False,
    },
}


class MotionUNet(DiffusersUNet):
    """A UNet of diffusers with motion modules; ``unet`` is the library's ``UNetMotionModel``.

    Sites are those of the UNet that sees single frames: motion modules are left as they are.

    bands, config, seed: as of ``DiffusersUNet``; config "sd15" or "tiny_sd15", or arguments.
    pretrained: where the weights of the single frames come from.
    motion: where those of the motion modules do: a folder or Hugging Face name of diffusers' ``MotionAdapter``, or a
    file with AnimateDiff's own names. Where such a file holds the whole UNet, as I2V-Adapter's does, all of it is
    taken. None draws random weights.
    motion_config: arguments of diffusers' ``MotionAdapter``, where ``config`` is no name.
    content: a file of an IP-Adapter (Ye et al., 2023), whose image tokens the frozen cross-attentions then see too;
    calls then need ``added_cond_kwargs={"image_embeds": [(B, images, tokens, width)]}``.
    per_frame_norm: the norm at the start of each motion module takes every frame by itself, as AnimateDiff's own code
    does, whose weights were trained so; False takes all frames of a clip together, as diffusers does (the outputs
    differ strongly).

    Raises RequestError where a config is unknown, or weights are for another one.
    """

    def __init__(
        self,
        bands: int | None = None,
        *,
        config: str | dict[str, Any] = "sd15",
        pretrained: str | None = None,
        motion: str | None = None,
        motion_config: dict[str, Any] | None = None,
        content: str | None = None,
        per_frame_norm: bool = True,
        seed: int = 0,
    ):
        if isinstance(config, str) and config in CONFIGS and config not in MOTION:
            raise RequestError(f"no motion modules for UNet config {config!r}; there are some for {', '.join(MOTION)}")
        super().__init__(bands, config=config, pretrained=pretrained, seed=seed)
        arguments = MOTION.get(config, {}) if isinstance(config, str) else {}
        meta = next(self.unet.parameters()).is_meta
        found = None if meta else motion
        file = found is not None and Path(found).is_file()
        self.unet = _inflated(self.unet, None if file else found, {**arguments, **(motion_config or {})}, seed)
        self.source = f"{self.source}; motion: {motion or f'random (seed {seed})'}"
        state = read(found) if found is not None and file else {}
        if content is not None and not meta:
            attach_content(self.unet, read_content(content), {k: v for k, v in state.items() if "_ip." in k}, content)
        elif any("_ip." in key for key in state):
            raise RequestError(f"{motion}: it holds an IP-Adapter's attention; give its image projection as content")
        if state:
            load_original(self.unet, state, str(motion))
        norm_per_frame(self.unet, per_frame_norm)

    @property
    def content(self) -> Any:
        """The image projection of the content branch; None where there is none."""
        projection = getattr(self.unet, "encoder_hid_proj", None)
        return None if projection is None else projection.image_projection_layers[0]

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """sample (B, C, F, h, w), timestep, encoder_hidden_states (B, tokens, width) or (B * F, tokens, width)."""
        frames, most = sample.shape[2], self.unet.config.motion_max_seq_length
        if frames > most:
            raise RequestError(f"{frames} frames: the motion modules know {most} positions")
        if len(encoder_hidden_states) == len(sample):  # diffusers wants a row for every frame
            encoder_hidden_states = encoder_hidden_states.repeat_interleave(frames, dim=0)
        return self.unet(sample, timestep, encoder_hidden_states, *args, **kwargs)


def _inflated(unet: Any, motion: str | None, arguments: dict[str, Any], seed: int) -> Any:
    """The video UNet around a text-to-image UNet's weights."""
    from diffusers.models.unets.unet_motion_model import MotionAdapter, UNetMotionModel

    if motion is None:
        with torch.random.fork_rng(devices=[]), torch.device(unet.device):
            torch.default_generator.manual_seed(seed + 1)
            adapter = _checked(MotionAdapter, arguments)
    else:
        try:
            adapter = MotionAdapter.from_pretrained(motion)
        except (OSError, ValueError) as error:
            raise RequestError(f"{motion}: no motion modules to load: {' '.join(str(error).split())[:200]}") from error
        for name, wanted in arguments.items():
            have = adapter.config.get(name)  # type: ignore[union-attr]
            if (tuple(have) if isinstance(have, list) else have) != (
                tuple(wanted) if isinstance(wanted, list) else wanted
            ):
                raise RequestError(f"{motion}: its motion modules have {name} {have}; the config says {wanted}")
    with torch.random.fork_rng(devices=[]), torch.device(unet.device), _quiet():
        try:
            return UNetMotionModel.from_unet2d(unet, adapter)
        except (ValueError, RuntimeError) as error:
            raise RequestError(f"motion modules for another UNet: {' '.join(str(error).split())[:200]}") from error


def _checked(kind: Any, arguments: dict[str, Any]) -> Any:
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise RequestError(f"motion modules: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's remark that a UNet goes to the precision it already has."""
    logger = logging.getLogger("diffusers.models.modeling_utils")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class PerFrameNorm(nn.GroupNorm):
    """A GroupNorm whose statistics are of one frame."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, F, h, w) to the same."""
        return super().forward(input.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(input), -1)).transpose(1, 2)


def norm_per_frame(unet: nn.Module, on: bool = True) -> None:
    """Let the first norm of every motion module take each frame by itself, or again all frames together.

    Works on any ``UNetMotionModel`` or ``MotionAdapter``; weights and names stay as they are.
    """
    from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D

    for module in unet.modules():
        if isinstance(module, AnimateDiffTransformer3D):
            module.norm.__class__ = PerFrameNorm if on else nn.GroupNorm


def load_original(unet: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Fill a ``UNetMotionModel`` from tensors with AnimateDiff's own names: its motion modules, or all of it.

    Raises RequestError where a tensor is missing, not used, or of another shape; the UNet is unchanged then.
    """
    from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers

    for key, table in state.items():
        if key.endswith("pos_encoder.pe") and table.shape[-2] != (most := unet.config.motion_max_seq_length):  # type: ignore[union-attr]
            raise RequestError(f"{source}: {key} has {table.shape[-2]} positions; the config says {most}")
    given = convert_animatediff_checkpoint_to_diffusers({k: v for k, v in state.items() if "_ip." not in k})
    if not any(".motion_modules." in key for key in given):
        raise RequestError(f"{source}: no motion modules in it")
    whole = "conv_in.weight" in given
    mine = {
        name: tensor
        for name, tensor in unet.state_dict().items()
        if ".motion_modules." in name or (whole and "_ip." not in name and not name.startswith("encoder_hid_proj."))
    }
    mine = {name: tensor for name, tensor in mine.items() if not name.endswith("pos_embed.pe")}
    lacking, extra = sorted(mine.keys() - given.keys()), sorted(given.keys() - mine.keys())
    wrong = [name for name in mine if name in given and given[name].shape != mine[name].shape]
    if lacking or extra or wrong:
        found = (("missing", lacking), ("not used", extra), ("of another shape", wrong))
        raise RequestError(
            f"{source}: made for another UNet: "
            + ", ".join(f"{len(names)} tensors {what} (first: {names[0]})" for what, names in found if names)
        )
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(given[name])
