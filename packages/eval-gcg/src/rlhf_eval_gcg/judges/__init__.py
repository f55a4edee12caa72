"""Rewards that judge answers to attacks: refusals, and classifiers that answer with a word."""
