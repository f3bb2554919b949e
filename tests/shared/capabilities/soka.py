"""SoKA with one rank everywhere, so that its record's formula is exact."""

HOSTS = {
    "vit": {"rank_min": 2, "rank_max": 2},
    "attention": {"rank_min": 2, "rank_max": 2},
    "convolutions": {"rank_min": 2, "rank_max": 2, "roles": "conv"},
    "llama": {"rank_min": 3, "rank_max": 3},
    "bloom": {"rank_min": 2, "rank_max": 2, "factors": [2, 4]},
}
