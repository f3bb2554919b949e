"""SparseAdapter in its three forms; local masks, so that something of every matrix trains."""

ALL = {"width": 5, "density": 0.5, "scope": "local"}
HOSTS = {
    "vit": {**ALL, "scale": "learned"},
    "clip": {**ALL, "norm": "out", "pruner": "magnitude"},
    "bert": {**ALL, "form": "pfeiffer", "norm": "none"},
    "llama": {**ALL, "form": "parallel", "pruner": "grasp"},
}
EXCLUDED = {"identity_at_start": "published start for pruning: both matrices normal with deviation 0.02"}
