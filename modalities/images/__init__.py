"""images: see the files of this folder."""
