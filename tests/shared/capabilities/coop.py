"""CoOp in the text tower of CLIP, which alone has words to replace."""

HOSTS = {"open_clip": {"count": 3}}
EXCLUDED = {"identity_at_start": "trained vectors stand where the words were"}
