"""Bottlenecks of low-rank layers."""

HOSTS = {"vit": {"reduction": 4, "rank": 2, "start": "zero"}, "bert": {"reduction": 4, "start": "zero"}}
