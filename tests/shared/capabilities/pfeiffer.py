"""Bottlenecks at the end of blocks, with a norm there (BERT) and without."""

HOSTS = {
    "vit": {"reduction": 4, "start": "zero"},
    "bert": {"reduction": 4, "start": "zero"},
    "llama": {"reduction": 4, "start": "zero"},
}
