"""RDTF: short clips from text and from any of their frames, trained from scratch."""
