"""Parallel adapters of LLM-Adapters: refusing to merge unless linear."""

HOSTS = {
    "vit": {"width": 5, "start": "zero"},
    "clip": {"width": 5, "start": "zero", "roles": ("mlp.up", "mlp.down"), "scale": "learned"},
    "llama": {"width": 5, "roles": ("attention.value", "mlp.up", "mlp.down"), "start": "zero"},
}
EXCLUDED = dict.fromkeys(("folded_separate_merged", "unmerge_exact"), "only the linear form merges: tested apart")
