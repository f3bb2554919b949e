"""Rein on token backbones, without the link, which is for one head and tested with it."""

HOSTS = {
    "vit": {"tokens": 6, "rank": 2, "link": False, "zero": True},
    "clip": {"tokens": 6, "rank": None, "link": False, "zero": True},
}
