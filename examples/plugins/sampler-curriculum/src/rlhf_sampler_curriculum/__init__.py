"""A curriculum over the rows of data."""
