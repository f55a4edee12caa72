"""A rollout engine behind HTTP, and a small server that it works with."""
