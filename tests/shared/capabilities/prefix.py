"""Prefix tuning: through a language model's cache, and inside the attention of vision transformers."""

HOSTS = {
    "vit": {"count": 3, "projection": 4},
    "llama": {"count": 3},
    "bert": {"count": 2, "projection": 5},
    "bloom": {"count": 2},
}
EXCLUDED = {"identity_at_start": "attention shares its weight with the new keys"}
