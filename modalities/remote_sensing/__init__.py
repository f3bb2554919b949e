"""remote sensing: see the files of this folder."""
