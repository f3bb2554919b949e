"""AdapterFusion needs adapters to fuse."""

ABSENT = "it needs finished adapters in the model: the same checks run with some in methods/test_adapter_fusion.py"
