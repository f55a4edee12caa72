"""A tiny run on the command line, and what it says where it must say one line."""

from __future__ import annotations

import pytest

from rlhf_core.cli import main

__all__ = ["RUN", "one_line"]

RUN = (
    "rlhf_core.testing.tiny_algorithm:TinyAlgorithm --model tiny:hidden=8,layers=1 --data prompts --rollout hf --reward length "
    "--batch-size 2 --sampling.max-new-tokens 2 --steps 1 --output run"
)


def one_line(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Return the one-line answer to the usual arguments and these."""
    assert main([*RUN.split(), *words]) == code, words
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("rlhf-run: ")]
    assert len(lines) == 1, (words, said[:2000])
    return lines[0]
