"""SparseLoRA on called and on read projections; local masks, so that something of every factor trains."""

ALL = {"rank": 3, "density": 0.5, "scope": "local"}
HOSTS = {
    "vit": ALL,
    "attention": {**ALL, "pruner": "random"},
    "convolutions": {**ALL, "roles": ("conv",)},
}
EXCLUDED = {
    "identity_at_start": "published start for pruning: both factors normal with deviation 0.02",
    "merge_refused": "merges",
}
