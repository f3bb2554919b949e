"""S2A with all its parts on a vision transformer."""

HOSTS = {
    "vit": {"prompts": 3, "prompt_rank": 2, "reduction": 6},
    "clip": {"prompts": 2, "prompt_rank": None, "reduction": 6},
}
EXCLUDED = {"identity_at_start": "attention shares its weight with the new tokens"}
