"""(IA)^3 on attention and MLP."""

HOSTS = {"vit": {}, "clip": {}, "attention": {"roles": ("attention.key", "attention.value")}}
