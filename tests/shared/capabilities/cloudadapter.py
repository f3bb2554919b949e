"""Cloud-Adapter on token backbones."""

HOSTS = {"vit": {"width": 6, "rank": 2, "stages": 3}, "clip": {"width": 6, "rank": 2, "stages": 3}}
EXCLUDED = {"identity_at_start": "both factors of the published projections start non-zero"}
