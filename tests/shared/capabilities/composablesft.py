"""ComposableSFT on described and undescribed parameters: bare tokens, read attention, embeddings of unseen tokens."""

ALL = {"epochs": 1, "learning_rate": 1e-3}
HOSTS = {"vit": {**ALL, "share": 0.9}, "encoder": {**ALL, "share": 0.9}, "bert": {**ALL, "share": 0.84}}
EXCLUDED = {"merge_refused": "merges"}
