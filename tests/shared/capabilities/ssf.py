"""SSF on everything that has a weight."""

HOSTS = {"vit": {}, "clip": {}, "attention": {}, "encoder": {}, "convolutions": {}, "llama": {}}
