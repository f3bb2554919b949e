"""Hydra on called linear layers, with and without biases."""

HOSTS = {
    "vit": {"scale": 0.5},
    "clip": {"roles": ("mlp.down", "mlp.up"), "scale": "learned", "start": "normal"},
    "llama": {"sequential_rank": 3, "roles": ("attention.query", "mlp.down")},
    "bert": {"parallel_rank": 3, "bias": False, "start": "kaiming", "roles": ("mlp.down",)},
}
