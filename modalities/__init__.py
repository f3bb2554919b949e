"""One package per modality: its data, frozen backbones, heads, tasks and published systems."""
