"""MoLA on separate and fused projections; one expert everywhere is LoRA, tested apart."""

SMALL = {"rank": 2, "alpha": 3.0, "dropout": 0.0}
HOSTS = {
    "vit": {**SMALL, "experts": "32", "roles": ("attention.query", "attention.value", "mlp.up", "mlp.down")},
    "clip": {**SMALL, "experts": "2", "roles": ("mlp.up", "mlp.down")},
    "llama": {**SMALL, "experts": "24"},
    "bert": {**SMALL, "experts": "3", "top_k": 2},
    "bloom": {**SMALL, "experts": "2"},
}
EXCLUDED = dict.fromkeys(("folded_separate_merged", "unmerge_exact"), "only a single expert merges: tested apart")
