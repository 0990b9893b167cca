"""Evaluation of data sets: totals that merge exactly, sources that are read block by block, and the driver between
them."""
