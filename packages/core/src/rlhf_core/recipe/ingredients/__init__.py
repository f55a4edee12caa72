"""The ingredients that come with core."""
