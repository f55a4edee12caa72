"""The optimizer `muon`."""
