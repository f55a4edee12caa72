"""Analyze many runs: curves over seeds, and the rate of bad outputs against its cost."""
