"""An exception out of a provider carries a note that names the provider and its distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_core import Example, Rollouts, UsageError, hookimpl
from rlhf_core.contract.providers import Data, Reward
from rlhf_core.plugins.attribution import note_provider
from rlhf_core.plugins.registry import Registry
from rlhf_core.testing import tiny_run


@dataclass(frozen=True)
class Lookup(Reward):
    """A reward that looks for what no row has."""

    def __call__(self, rollouts: Rollouts) -> list[float]:
        return [self.one(meta) for meta in rollouts.meta]

    @staticmethod
    def one(meta: object) -> float:
        return float(meta["no such key"])  # type: ignore[index]


@dataclass(frozen=True)
class Torn(Data):
    """Data that cannot be read."""

    def __call__(self, split: str) -> Sequence[Example]:
        raise OSError("the disk is gone")


def registry_with(kind: str, cls: type) -> Registry:
    registry = Registry(autoload=False)

    def provide() -> dict[str, type]:
        return {"mine": cls}

    plugin = SimpleNamespace(**{f"rlhf_{kind}": hookimpl(provide)})
    registry.register(plugin, "stranger", "rlhf-stranger", "1.2")
    return registry


def test_a_key_error_in_a_reward_names_the_reward_and_its_distribution(tmp_path: Path) -> None:
    with pytest.raises(KeyError) as caught:
        tiny_run(tmp_path, registry=registry_with("reward", Lookup), reward="mine").train()
    assert caught.value.__notes__ == ["in reward 'mine' of rlhf-stranger 1.2"]


def test_a_provider_that_is_registered_nowhere_is_named_by_its_class(tmp_path: Path) -> None:
    with pytest.raises(KeyError) as caught:
        tiny_run(tmp_path, reward=Lookup()).train()
    assert caught.value.__notes__ == [f"in reward {__name__}:Lookup"]


def test_a_provider_that_fails_before_the_first_step_is_named_too(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk is gone") as caught:
        tiny_run(tmp_path, registry=registry_with("data", Torn), data="mine").train()
    assert caught.value.__notes__ == ["in data 'mine' of rlhf-stranger 1.2"]


def test_the_innermost_of_two_providers_is_named_once() -> None:
    @dataclass(frozen=True)
    class Outer:
        """Calls another reward."""

        def __call__(self) -> list[float]:
            return Lookup()(SimpleNamespace(meta=[{}]))  # type: ignore[arg-type]

    registry = registry_with("reward", Lookup)
    registry.register(SimpleNamespace(rlhf_reward=hookimpl(lambda: {"outer": Outer})), "other")
    with pytest.raises(KeyError) as caught:
        Outer()()
    for _ in range(2):
        note_provider(caught.value, registry)
    assert caught.value.__notes__ == ["in reward 'mine' of rlhf-stranger 1.2"]


def test_errors_on_purpose_and_errors_of_nobody_get_no_note() -> None:
    for error in (UsageError("do this instead"), ValueError("elsewhere")):
        with pytest.raises(ValueError) as caught:  # both are, and their texts are above
            raise error
        note_provider(caught.value, Registry(autoload=False))
        assert not hasattr(caught.value, "__notes__")
