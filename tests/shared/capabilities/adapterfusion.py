"""AdapterFusion over three finished adapters, where blocks end with a norm and where they do not."""

import torch

from shared.adapted import Adapted
from shared.methods import Pfeiffer

HOSTS = {host: {"members": dict.fromkeys("abc"), "dropout": 0.0} for host in ("bert", "vit")}
EXCLUDED = {
    "identity_at_start": "it starts as the mean of its members, and those that do nothing are refused",
    "gradient_reaches_exactly_the_adapter": "the key's bias shifts all scores alike and has no gradient but rounding",
}


def before(model: Adapted) -> None:
    for seed, name in enumerate("abc"):
        model.add(Pfeiffer(reduction=4), name=name)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.bank[name].parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
