"""The field's silent failures, run again beside gpuxent and the truth. `python -m bench.failures --help` says how."""
