ABSENT = "needs a promptable model: tests/modalities/images/test_adapter_shadow.py"
