"""Replay of RAW-Adapter: the predicted numbers, the processed images, the side features and the merged maps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from modalities.images.raw_adapter import Develop, Merge, RAWAdapter, from_official
from shared import Site, Sites, adapt
from shared.backbone import Backbone, Features


class Given(Backbone):
    """Stages that give fixed maps: what is left is the adapter."""

    def __init__(self, maps: list[Tensor]):
        super().__init__("given")
        self.stages, self.maps = nn.ModuleList(nn.Identity() for _ in maps), maps
        self.seen: Tensor | None = None

    def sites(self) -> Sites:
        return Sites([
            Site("model", 0, "", self, None, layout="BCHW", width=3),
            *(
                Site("block", i, f"stages.{i}", s, None, layout="BCHW", width=m.shape[1], tags=(f"stage{i}",))
                for i, (s, m) in enumerate(zip(self.stages, self.maps, strict=True))
            ),
        ])  # fmt: skip

    def forward(self, image: Tensor) -> Features:
        self.seen = image
        maps = tuple(stage(m) for stage, m in zip(self.stages, self.maps, strict=True))
        return Features(maps, maps[-1].mean((2, 3)))


def replay(case: dict[str, np.ndarray], meta: dict) -> dict[str, tuple[Tensor, np.ndarray]]:
    """Pairs (ours, published) of every output of the case."""
    config = meta["config"]
    image = torch.from_numpy(case["in.image"])
    backbone = Given([torch.from_numpy(case[f"in.fea{i}"]) for i in (1, 2, 3)])
    low = config["mode"] == "low"
    method = RAWAdapter(
        width=config["in_dim"], middle=config["mid_c_s"], kernel=config["k_size"], ratio=config["merge_ratio"],
        lut=config["lut_dim"] if config["w_lut"] else None, predictor=config.get("predictor_dim", 64),
        gain=3.0 if low else 1.0, train_gain=not low,
    )  # fmt: skip
    model = adapt(backbone, method, example=None)
    keys = list(model.bank["default"])
    sd = {name.removeprefix("sd."): torch.from_numpy(value) for name, value in case.items() if name.startswith("sd.")}
    model.load_trained_state({f"adapter.default.{from_official(n, keys)}": t for n, t in sd.items()})
    model.eval()
    develop, *merges = model.bank["default"].values()
    with torch.no_grad():
        ours = _front(develop, image) | _sides(develop, merges, image, backbone.maps)
        maps = model(image).maps
    assert backbone.seen is not None
    pairs = {name: (value, case[name]) for name, value in ours.items() if name in case}
    for i, merged in enumerate(maps):
        pairs[f"out.merged{i + 1}"] = (merged, case[f"out.merged{i + 1}"])
    last = "out.I5" if config["w_lut"] else "out.I4"
    pairs[f"{last} as the network sees it"] = (backbone.seen, case[last])
    return pairs


def _front(develop: Develop, image: Tensor) -> dict[str, Tensor]:
    isp = develop.pre_encoder
    images = isp(image)
    blur = isp.Predictor_K.predict(image)
    matrix, rho = isp.Predictor_M.predict(images[1])
    numbers = {f"out.{name}": value for name, value in blur._asdict().items()}
    stages = {f"out.I{i + 1}": stage for i, stage in enumerate(images) if i}
    return numbers | {"out.ccm": matrix, "out.distance": rho[:, None]} | stages


def _sides(develop: Develop, merges: list[Merge], image: Tensor, maps: list[Tensor]) -> dict[str, Tensor]:
    side: Tensor | None = develop.model_adapter(develop.pre_encoder(image))
    found: dict[str, Tensor] = {}
    for i, (merge, features) in enumerate(zip(merges, maps, strict=True)):
        assert side is not None
        found[f"out.adapter{i}"] = side
        _, side = merge.merge(features, side)
    return found
