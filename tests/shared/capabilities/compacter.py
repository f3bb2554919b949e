"""Compacter with a rule for all layers, and with rules and whole slices of their own."""

HOSTS = {
    "vit": {"reduction": 4, "n": 2, "start": "zero"},
    "clip": {"reduction": 6, "n": 2, "rank": None, "shared_rule": False, "start": "zero"},
    "llama": {"reduction": 4, "n": 4, "factorised_rule": True, "start": "zero"},
}
