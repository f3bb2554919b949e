"""Hyperformer with one task, which needs no naming."""

SMALL = {"reduction": 4, "embedding": 6, "hidden": 7, "projected": 5, "start": "zero"}
HOSTS = {"vit": SMALL, "clip": {**SMALL, "unique": True}, "llama": {**SMALL, "norm_before": True}}
