"""ComposableSFT on models of described and of undescribed parameters: bare tokens, read attention, convolutions."""

ALL = {"share": 0.9, "epochs": 1, "learning_rate": 1e-3}
HOSTS = {"vit": ALL, "clip": ALL, "encoder": ALL, "convolutions": ALL, "bert": ALL, "llama": ALL, "bloom": ALL}
EXCLUDED = {"merge_refused": "merges"}
