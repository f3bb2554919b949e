"""diffusion: see the files of this folder."""
