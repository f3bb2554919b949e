"""SketchTune in place of every linear layer that is called."""

HOSTS = {
    "vit": {"groups": 2},
    "clip": {"groups": 1, "bits": 3, "roles": ("mlp.up", "mlp.down")},
    "llama": {"groups": 2},
    "bert": {"groups": 4, "bits": 2},
    "bloom": {"groups": 1, "dtype": "float32"},
}
EXCLUDED = {"identity_at_start": "the compressed weights are near the frozen ones, not equal to them"}
