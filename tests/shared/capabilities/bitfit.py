"""BitFit wherever there are biases."""

HOSTS = {"vit": {}, "clip": {}, "attention": {}, "encoder": {}, "convolutions": {}}
EXCLUDED = {"merge_refused": "merges"}
