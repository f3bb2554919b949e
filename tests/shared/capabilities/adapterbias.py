"""AdapterBias on models whose norms follow the MLP, precede it, and whose MLP has no bias."""

HOSTS = {"bert": {}, "vit": {"share_alpha": True}, "llama": {"norms": False}}
EXCLUDED = {"merge_refused": "merges"}
