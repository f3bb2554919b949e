"""BlackVIP in front of an image tower, which has gradients; black boxes are in tests/modalities/images."""

HOSTS = {
    "clip": {
        "encoder": "vit_tiny_patch16_224",
        "encoder_weights": "random",
        "encoder_args": {"patch_size": 8, "model_args": {"depth": 1, "embed_dim": 24, "num_heads": 2}},
        "image_size": 32,
        "trigger": 8,
    }
}
EXCLUDED = {"identity_at_start": "the published decoder paints from the start"}
