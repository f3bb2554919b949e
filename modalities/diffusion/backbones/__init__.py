"""Frozen diffusion models and their sites."""
