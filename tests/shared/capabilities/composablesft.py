"""ComposableSFT on described and undescribed parameters: bare tokens, read attention, embeddings.

Not on BERT: what is added to all keys changes no attention, so their biases never move and no entry of them is kept.
"""

ALL = {"epochs": 1, "learning_rate": 1e-3, "share": 0.9}
HOSTS = {"vit": ALL, "encoder": ALL, "bloom": ALL}
EXCLUDED = {"merge_refused": "merges"}
