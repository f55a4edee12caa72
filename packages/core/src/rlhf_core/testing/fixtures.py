"""Fixtures for authors, loaded by pytest wherever rlhf-core is installed: so nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.plugins.registry import Registry
    from rlhf_core.run.run import Run

__all__ = ["empty_registry", "registry", "tiny_rollouts", "tiny_run"]


@pytest.fixture
def empty_registry() -> Registry:
    """Core's own providers and nothing that happens to be installed; add yours with `empty_registry.register`."""
    from rlhf_core.plugins.registry import Registry

    return Registry(autoload=False)


@pytest.fixture
def registry() -> Registry:
    """Everything installed, as `rlhf-run` sees it."""
    from rlhf_core.plugins.registry import Registry

    return Registry()


@pytest.fixture
def tiny_rollouts() -> Rollouts:
    """Two prompts with four completions each: ragged, cut, empty, with tokens that were not sampled."""
    from rlhf_core.testing import tiny

    return tiny.tiny_rollouts()


@pytest.fixture
def tiny_run(tmp_path: Path) -> Callable[..., Run]:
    """`tiny_run(reward=MyReward())`: a run of two steps on the model `tiny`, not started, in a temporary folder."""
    from rlhf_core.testing import tiny

    def make(**options: Any) -> Run:
        return tiny.tiny_run(tmp_path / "run", **options)

    return make
