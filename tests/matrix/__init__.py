"""The core tests on every supported transformers: `python -m tests.matrix --help`."""
