"""ComposableSFT on described and undescribed parameters: bare tokens, read attention, embeddings.

Not on BERT, of whose small parts (segments, biases of keys) the selection may keep no entry that has a gradient.
"""

ALL = {"epochs": 1, "learning_rate": 1e-3, "share": 0.9}
HOSTS = {"vit": ALL, "encoder": ALL, "bloom": ALL}
EXCLUDED = {"merge_refused": "merges"}
