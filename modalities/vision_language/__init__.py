"""vision_language: see the files of this folder."""
