"""DoRA on every kind of weight."""

from tests.shared.capabilities import lora

HOSTS = {host: lora.HOSTS[host] for host in ("vit", "clip", "attention", "convolutions", "llama", "bloom")} | {
    "bert": {"rank": 2, "detach_norm": False, "roles": ("attention.query", "mlp.down")}
}
