"""Replay of I2V-Adapter's published modules, for ``python -m tests.parity``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modalities.diffusion.backbones.motion import norm_per_frame
from modalities.diffusion.video.i2v_adapter import I2VAttention
from modalities.diffusion.video.starts import blurred, degraded
from shared.errors import RequestError


@torch.no_grad()
def replay(case: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Our output and the published one for every output of the case.

    case: ``in.<part>.*``, ``sd.<part>.*`` and ``out.<part>`` for the parts mixed (the spatial attention), ip (the
    cross-attention with image tokens), motion, resampler and prior.  meta: ``config``, the sizes.
    """
    known = {"mixed": _mixed, "ip": _ip, "motion": _motion, "resampler": _resampler, "prior": _prior}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for part in dict.fromkeys(name.split(".")[1] for name in case if name.startswith("out.")):
        if part not in known:
            raise RequestError(f"out.{part}: known are {', '.join(known)}")
        given = {name: torch.from_numpy(np.array(array)) for name, array in case.items()}
        for suffix, ours in known[part](_under(given, "sd", part), given, meta["config"]).items():
            pairs[f"out.{part}{suffix}"] = (ours, given[f"out.{part}{suffix}"])
    return pairs


def _under(given: Mapping[str, Tensor], *prefix: str) -> dict[str, Tensor]:
    start = "".join(f"{word}." for word in prefix)
    return {name.removeprefix(start): tensor for name, tensor in given.items() if name.startswith(start)}


def _attention(state: Mapping[str, Tensor], config: Mapping[str, Any], cross: int | None = None) -> Any:
    from diffusers.models.attention_processor import Attention

    attention = Attention(config["dim"], cross, heads=config["heads"], dim_head=config["dim_head"])
    attention.load_state_dict({name: state[name] for name in attention.state_dict()})
    return attention.eval()


def _mixed(state: dict[str, Tensor], given: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    host, outputs = _attention(state, config), {}
    for suffix in ("", ".zero_to_out_ff"):
        branch = I2VAttention(host)
        branch.context.frames = config["video_length"]
        branch.load_state_dict({name: state[name] for name in branch.state_dict()})
        if suffix:
            for tensor in branch.to_out_ff.parameters():
                tensor.zero_()
        outputs[suffix] = branch(host.forward, given["in.mixed.hidden_states"])
    return outputs


def _ip(state: dict[str, Tensor], given: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """diffusers' own attention with image tokens."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    count, cross = config["image_tokens"], config["cross_attention_dim"]
    attention = _attention(state, config, cross)
    processor = IPAdapterAttnProcessor2_0(config["dim"], cross, num_tokens=(count,))
    processor.load_state_dict({f"{name}.0.weight": state[f"{name}.weight"] for name in ("to_k_ip", "to_v_ip")})
    attention.set_processor(processor)
    tokens = given["in.ip.encoder_hidden_states"]
    text, image = tokens[:, :-count], tokens[:, -count:]
    return {"": attention(given["in.mixed.hidden_states"], encoder_hidden_states=(text, [image[:, None]]))}


def _motion(state: dict[str, Tensor], given: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """diffusers' motion module with its norm per frame; positions it computes itself, which must be the file's."""
    from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers
    from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D

    sizes, x = config["motion"], given["in.motion.input"]
    module = AnimateDiffTransformer3D(
        sizes["heads"], sizes["in_channels"] // sizes["heads"], sizes["in_channels"], num_layers=sizes["blocks"],
        positional_embeddings="sinusoidal", num_positional_embeddings=sizes["max_len"],
    )  # fmt: skip
    converted = {k.lstrip("."): v for k, v in convert_animatediff_checkpoint_to_diffusers(
        {f".{name}": tensor for name, tensor in state.items()}).items()}  # fmt: skip
    converted = {k.removeprefix("temporal_transformer."): v for k, v in converted.items()}
    tables = {name: tensor for name, tensor in module.state_dict().items() if name.endswith(".pe")}
    for name, tensor in state.items():
        if name.endswith(".pe") and any((tensor - table).abs().max() > 1e-5 for table in tables.values()):
            raise RequestError(f"sd.motion.{name}: positions other than sines")
    module.load_state_dict({**tables, **converted})
    norm_per_frame(module)
    frames = x.shape[2]
    rows = module.eval()(x.transpose(1, 2).flatten(0, 1), num_frames=frames)
    return {"": rows.unflatten(0, (-1, frames)).transpose(1, 2)}


def _resampler(state: dict[str, Tensor], given: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """diffusers' image projection, built at the case's sizes: its loader knows heads of 64 alone."""
    from diffusers.models.embeddings import IPAdapterPlusImageProjection

    sizes = config["resampler"]
    module = IPAdapterPlusImageProjection(
        sizes["embedding_dim"], sizes["output_dim"], sizes["dim"], sizes["depth"], sizes["dim_head"], sizes["heads"],
        sizes["num_queries"], sizes["ff_mult"],
    )  # fmt: skip
    names = {"0.norm1.": "ln0.", "0.norm2.": "ln1.", "0.to_q.": "attn.to_q.", "0.to_out.": "attn.to_out.0.",
             "1.0.": "ff.0.", "1.1.": "ff.1.net.0.proj.", "1.3.": "ff.1.net.2."}  # fmt: skip
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, _, inner = name.removeprefix("layers.").partition(".")
        if not name.startswith("layers."):
            converted[name] = tensor
        elif inner == "0.to_kv.weight":
            for part, half in zip(("to_k", "to_v"), tensor.chunk(2), strict=True):
                converted[f"layers.{layer}.attn.{part}.weight"] = half
        else:
            old = next(old for old in names if inner.startswith(old))
            converted[f"layers.{layer}.{names[old]}{inner.removeprefix(old)}"] = tensor
    module.load_state_dict(converted)
    return {"": module.eval()(given["in.resampler.x"])}


def _prior(state: dict[str, Tensor], given: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    latents = given["in.prior.latents"]
    return {".blurred": blurred(latents), ".degraded": degraded(latents, given["in.prior.mask"])}
