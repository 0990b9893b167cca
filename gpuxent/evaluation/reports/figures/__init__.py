"""The figures of a report: their data, how they are drawn, and what they say in words."""
