"""Replays of the published code: one file a system, with ``replay(case, meta)``."""
