"""What rows leave behind, merged exactly, and the statistics made of it."""
