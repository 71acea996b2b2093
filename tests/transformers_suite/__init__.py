"""transformers' own model tests on the classes of this repository: `python -m tests.transformers_suite --help`."""
