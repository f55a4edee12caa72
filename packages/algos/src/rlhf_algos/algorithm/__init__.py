"""Presets: one a file, each composes terms."""
