"""Bi-LoRA without dropout, where it merges, on weights that are called and weights that are read."""

HOSTS = {
    "vit": {"width": 5, "dropout": 0.0},
    "clip": {"width": 5, "bits": 2, "dropout": 0.0},
    "llama": {"width": 4, "bits": 4, "dropout": 0.0},
    "bert": {"width": 4, "dropout": 0.0},
}
EXCLUDED = {
    "identity_at_start": "a rounded matrix of noise is no zero: nearly the identity",
    "merge_refused": "merges without dropout",
}
