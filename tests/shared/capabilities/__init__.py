"""What the capability matrix tries of each method: one file a method, named as in a recipe without ``_``."""
