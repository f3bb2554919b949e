"""The commands of the command line; only what is asked for is imported."""
