"""Prompts, deep and shallow."""

HOSTS = {"vit": {"count": 3}, "clip": {"count": 3, "deep": False}}
EXCLUDED = {"identity_at_start": "attention shares its weight with the new tokens"}
