"""Environments of other libraries, each a short provider over the public contract."""
