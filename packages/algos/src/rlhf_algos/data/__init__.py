"""Data: rows made of other rows."""
