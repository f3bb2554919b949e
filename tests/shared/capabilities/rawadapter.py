"""RAW-Adapter on a network of four stages."""

HOSTS = {"resnet": {"width": 4, "middle": (5, 6, 7), "predictor": 16, "lut": 8}}
EXCLUDED = {"identity_at_start": "an image processor that starts from a gain, a blur and random convolutions"}
