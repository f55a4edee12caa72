"""Recipes: pipelines of ingredients that are run, resumed and explained from one file."""
