"""Tasksets of verifiers as environments."""
