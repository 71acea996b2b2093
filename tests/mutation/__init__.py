"""Plants defects in the core and tells which ones the tests let pass: `python -m tests.mutation --help`."""
