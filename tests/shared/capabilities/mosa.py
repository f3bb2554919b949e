"""MoSA beside and behind MLPs and on the residual stream, each projection shared in turn."""

HOSTS = {
    "vit": {"width": 5, "dropout": 0.0},
    "clip": {"width": 5, "experts": 3, "share": "none", "style": "pfeiffer", "scale": 1.0, "dropout": 0.0},
    "llama": {"width": 5, "experts": 2, "share": "up", "style": "houlsby", "norm": False, "scale": 1.0, "dropout": 0.0},
    "bloom": {"width": 5, "share": "none", "norm": False, "dropout": 0.0},
}
