"""MoSL on weights that are called and weights that are read, each factor shared in turn."""

HOSTS = {
    "vit": {"rank": 3},
    "clip": {"rank": 3, "share": "none", "copies": True},
    "llama": {"rank": 3, "experts": 2, "share": "up"},
    "convolutions": {"rank": 3, "roles": ("conv",), "merge": "union", "share": "none"},
}
