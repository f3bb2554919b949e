"""AdaptFormer beside MLPs."""

HOSTS = {"vit": {"width": 5, "dropout": 0.0}, "clip": {"width": 5, "dropout": 0.0}, "sam": {"width": 5, "dropout": 0.0}}
