"""Two models on the same tokens."""
