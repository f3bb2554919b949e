"""Cloud-Adapter on token backbones."""

SMALL = {"width": 6, "rank": 2, "stages": 3}
# On SAM, perturbed maps of more stages reach the hundreds, where float32 rounds by more than the matrix tolerates.
HOSTS = {"vit": SMALL, "clip": SMALL, "sam": {"width": 4, "rank": 1, "stages": 2}}
EXCLUDED = {"identity_at_start": "both factors of the published projections start non-zero"}
