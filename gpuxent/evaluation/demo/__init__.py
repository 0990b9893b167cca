"""The demonstration: a small language model of real text, and everything that is said of it."""
