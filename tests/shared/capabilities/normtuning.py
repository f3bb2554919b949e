"""Norm tuning wherever there are norms."""

HOSTS = {"vit": {}, "clip": {}, "encoder": {}}
