"""VL-Adapter in its sharing modes; calls of the matrix name no task, so there is one."""

HOSTS = {
    "vit": {"reduction": 4, "start": "zero"},
    "clip": {"reduction": 4, "start": "zero", "share": "down", "tasks": ["a"], "norm_before": True},
    "bert": {"reduction": 4, "start": "zero", "share": "none", "tasks": ["a"]},
    "bloom": {"reduction": 4, "start": "zero", "share": "up", "tasks": ["a"]},
}
