"""Run directories: finished blocks, the record of tokens, and what a run depends on."""
