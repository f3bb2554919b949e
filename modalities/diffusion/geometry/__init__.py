"""Cameras around an object, and meshes: seen, textured, repainted."""
