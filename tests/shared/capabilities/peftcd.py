"""PeftCD's adapter on token backbones and on what flows with channels last."""

HOSTS = {"vit": {"width": 4}, "clip": {"width": 4}}
EXCLUDED = {"identity_at_start": "the published adapter starts as torch's linear layers do"}
