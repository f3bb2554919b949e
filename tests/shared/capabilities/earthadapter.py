"""Earth-Adapter on token backbones."""

SMALL = {"width": 6, "split": (0, 2), "cutoff": 0.5}  # of a grid of 4 x 5 that makes 2 x 2 low frequencies
HOSTS = {"vit": SMALL, "clip": SMALL}
EXCLUDED = {"identity_at_start": "the published branches start non-zero"}
