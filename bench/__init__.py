"""Benchmarks: gpuxent beside its rivals and the machine's own limit, in one run. `python -m bench --help` says how."""
