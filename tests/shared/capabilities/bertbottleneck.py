"""Bottlenecks around the sub-layers of BERT: ``place`` and ``parts`` are tried in tests/shared/interop."""

HOSTS = {
    "bert": {"width": 5, "parts": ("attention", "mlp"), "widths": {"1": 3}, "scale": "learned"},
}
