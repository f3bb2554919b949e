ABSENT = "attaches nothing: tests/shared/methods/test_probe_and_full.py"
