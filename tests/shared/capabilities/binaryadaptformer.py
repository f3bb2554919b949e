"""Bi-AdaptFormer on blocks whose norm stands in front of the MLP."""

HOSTS = {"vit": {"width": 5, "dropout": 0.0}, "clip": {"width": 5, "bits": 4, "dropout": 0.0}}
EXCLUDED = {"identity_at_start": "a rounded matrix of noise is no zero: nearly the identity"}
