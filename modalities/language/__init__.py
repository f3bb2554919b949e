"""language: see the files of this folder."""
