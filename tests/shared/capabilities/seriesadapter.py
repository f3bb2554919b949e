"""Series adapters of LLM-Adapters."""

HOSTS = {
    "vit": {"width": 5, "start": "zero"},
    "clip": {"width": 5, "scale": "learned", "start": "zero"},
    "llama": {"width": 5, "roles": ("mlp.gate", "mlp.up", "attention.output"), "start": "zero"},
}
