"""`rlhf-run`: train an algorithm, or look around. Only training, `chat` and `doctor` import torch."""

from __future__ import annotations

from rlhf_core.cli.app import main

__all__ = ["main"]
