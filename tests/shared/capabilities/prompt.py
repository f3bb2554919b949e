"""Prompts, deep and shallow."""

HOSTS = {
    "vit": {"count": 3},
    "clip": {"count": 3, "deep": False},
    "llama": {"count": 3, "deep": False},
    "bert": {"count": 2, "deep": False, "hidden": 6},
}
EXCLUDED = {"identity_at_start": "attention shares its weight with the new tokens"}
