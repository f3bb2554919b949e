"""DyLoRA on every kind of weight, served at its own rank and below it; an alpha near the rank, as is LoRA's there."""

from tests.shared.capabilities import lora

HOSTS = {host: lora.HOSTS[host] | {"alpha": 3.0} for host in ("vit", "clip", "attention", "convolutions", "llama")} | {
    "bloom": lora.HOSTS["bloom"] | {"rank": 3, "serve": 2, "alpha": 3.0, "freeze_lower": False}
}
