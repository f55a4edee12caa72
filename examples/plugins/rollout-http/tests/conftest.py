"""A role of the server's model, and prompts for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import Example, Run, make_config

sys.path.append(str(Path(__file__).parent))  # `http_servers`, for the tests


@pytest.fixture
def tiny_role(model: str, tmp_path: Path) -> Iterator[Any]:
    """An actor of the server's model, after three updates that left it as it was."""
    run = Run(make_config("grpo", model=model, reward="length", batch_size=2, steps=1, output=str(tmp_path / "role")))
    with run.place() as placed:
        role = placed.roles["actor"]
        role.version = 3
        yield role


@pytest.fixture
def tiny_prompts(tiny_role: Any, model: str, tmp_path: Path) -> Any:
    """Three prompts."""
    run = Run(make_config("grpo", model=model, reward="length", batch_size=2, output=str(tmp_path / "prompts")))
    texts = ["Hello", "What is the colour of the sky?", "1 2 3"]
    return run.encoder.prompts([Example(text) for text in texts], [11, 12, 13])
