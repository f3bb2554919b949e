"""CorDA wherever linear layers are called, after it saw its data."""

HOSTS = {
    "vit": {"rank": 2},
    "encoder": {"rank": 2, "roles": "linear", "depth": [1, 3]},
    "llama": {"rank": 3, "mode": "kpa"},
    "bert": {"rank": 2, "bias": True},
    "bloom": {"rank": 2},
}
