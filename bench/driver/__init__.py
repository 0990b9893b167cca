"""What the driver costs beside the work itself. `python -m bench.driver --help` says how."""
