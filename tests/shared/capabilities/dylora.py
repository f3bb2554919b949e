"""DyLoRA on every kind of weight, served at its own and at a lower rank."""

from tests.shared.capabilities import lora

SERVED = {"rank": 3, "serve": 2}
HOSTS = {host: lora.HOSTS[host] for host in ("vit", "clip", "attention", "convolutions", "llama")} | {
    "bloom": lora.HOSTS["bloom"] | SERVED | {"freeze_lower": False},
}
EXCLUDED: dict[str, str] = {}
