"""LoRA on every kind of host."""

HOSTS = {
    "vit": {
        "rank": 2,
        "alpha": 3.0,
        "roles": ("attention.query", "attention.key", "attention.value", "attention.output", "mlp.up", "mlp.down"),
    },
    "clip": {"rank": 2, "roles": ("attention.query", "attention.value", "attention.output", "mlp.up")},
    "sam": {"rank": 2, "roles": ("attention.query", "attention.value", "attention.output", "mlp.up")},
    "open_clip": {"rank": 2, "roles": ("attention.query", "attention.value", "attention.output", "mlp.up")},
    "attention": {"rank": 2, "roles": ("attention.query", "attention.value", "attention.output")},
    "encoder": {"rank": 2, "roles": ("attention.query", "attention.key", "attention.output", "linear")},
    "convolutions": {"rank": 3, "roles": "conv"},
    "llama": {
        "rank": 2,
        "roles": (
            "attention.query",
            "attention.key",
            "attention.value",
            "attention.output",
            "mlp.up",
            "mlp.gate",
            "mlp.down",
        ),
    },
    "bert": {"rank": 2, "roles": ("attention.query", "attention.value", "attention.output", "mlp.up", "mlp.down")},
    "bloom": {"rank": 2, "roles": ("attention.qkv", "attention.output", "mlp.up", "mlp.down")},
}
