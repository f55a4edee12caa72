"""Ingredients of recipes, one file each."""
