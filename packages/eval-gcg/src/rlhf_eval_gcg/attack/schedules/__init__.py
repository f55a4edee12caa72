"""The suffix optimizers that come with this package, one file each."""
