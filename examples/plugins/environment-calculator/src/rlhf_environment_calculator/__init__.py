"""A calculator that a policy may use over several turns."""
