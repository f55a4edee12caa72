"""Providers with options of every type, which the tests of configuration choose among."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Literal

from rlhf_core.config.builder import parse
from rlhf_core.config.value_types import Secret
from rlhf_core.contract.hooks import hookimpl
from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import KL, ModelOptions, RunConfig, Sampling, TrainedOptions
from rlhf_core.contract.providers import Algorithm, Data, Evaluator, Reward, Rollout
from rlhf_core.plugins.registry import Registry


class Colour(Enum):
    """Something to choose from."""

    RED = 1
    BLUE = 2


@dataclass(frozen=True)
class Inner:
    """Options inside options."""

    depth: int = 1
    """how deep"""


@dataclass(frozen=True)
class Options:
    """An option of every type."""

    text: str = "a"
    """some text"""
    number: float = 0.5
    """a number"""
    count: int = 3
    """a count"""
    on: bool = False
    """a switch"""
    path: Path = Path("x/y")
    """a path"""
    choice: Literal["left", "right", 3] = "left"
    """a side, or three"""
    colour: Colour = Colour.RED
    """a colour"""
    maybe: int | None = None
    """a count or nothing"""
    either: int | str = 1
    """a count or a text"""
    words: tuple[str, ...] = ("a",)
    """words"""
    pair: tuple[int, float] = (1, 2.0)
    """a count and a number"""
    bag: frozenset[int] = frozenset({1})
    """counts in no order"""
    weights: Mapping[str, float] = field(default_factory=dict)
    """a number for each name"""
    inner: Inner = Inner()
    """options inside"""
    optional: Inner | None = None
    """options inside, or none"""


@dataclass(frozen=True)
class Rich(Options, Reward):
    """A reward with an option of every type."""

    def __call__(self, rollouts: Any) -> Any: ...


@dataclass(frozen=True)
class RichEvaluator(Options, Evaluator):
    """An evaluator with an option of every type."""

    def __call__(self, run: Any) -> Any: ...


@dataclass(frozen=True)
class InnerEvaluator(Inner, Evaluator):
    """An evaluator with one option."""

    def __call__(self, run: Any) -> Any: ...


@dataclass(frozen=True)
class Asks(Data):
    """Data that must be told where."""

    where: str
    """the place"""
    rows: int = 10
    """how many"""

    def __call__(self, split: str) -> Any: ...


@dataclass(frozen=True)
class Guarded(Reward):
    """A reward with a key and an opinion."""

    key: Annotated[str, Secret()] = ""
    """password of the judge"""
    limit: int = 1
    """what is allowed"""

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"limit must be positive, not {self.limit}")

    def __call__(self, rollouts: Any) -> Any: ...


@dataclass(frozen=True)
class Plain(Data):
    """Data without options."""

    def __call__(self, split: str) -> Any: ...


@dataclass(frozen=True)
class PlainRollout(Rollout):
    """An engine without options."""

    def __call__(self, role: Any, prompts: Any, sampling: Any) -> Any: ...


@dataclass(frozen=True)
class PlainEvaluator(Evaluator):
    """An evaluator without options."""

    def __call__(self, run: Any) -> Any: ...


@dataclass(frozen=True)
class Online(Algorithm):
    """An algorithm that samples."""

    clip: float = 0.2
    """where the ratio is cut"""
    kl: KL | None = KL()
    """the leash"""

    defaults: ClassVar[Mapping[str, str]] = {"data": "asks", "rollout": "plain", "reward": "rich"}
    roles: ClassVar[Mapping[str, Any]] = {"actor": TrainedOptions(optim=AdamW(lr=3e-5)), "reference": ModelOptions()}
    config_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 8, "sampling": Sampling(n=2)}

    def __call__(self, choices: Any) -> Any: ...


@dataclass(frozen=True)
class Offline(Algorithm):
    """An algorithm that reads."""

    defaults: ClassVar[Mapping[str, str]] = {"data": "asks"}
    roles: ClassVar[Mapping[str, Any]] = {"reward": TrainedOptions()}

    def __call__(self, choices: Any) -> Any: ...


TABLES: dict[str, dict[str, type]] = {
    "data": {"asks": Asks, "plain": Plain},
    "rollout": {"plain": PlainRollout},
    "reward": {"rich": Rich, "guarded": Guarded},
    "algorithm": {"online": Online, "offline": Offline},
    "evaluator": {"inner": InnerEvaluator, "rich": RichEvaluator, "plain": PlainEvaluator},
}


def fake_registry() -> Registry:
    """Core and the fakes above, nothing that happens to be installed."""
    registry = Registry(autoload=False)
    hooks = {f"rlhf_{kind}": hookimpl(lambda kind=kind: TABLES[kind]) for kind in TABLES}
    registry.register(SimpleNamespace(**hooks), "fakes", "rlhf-fakes", "0.1")
    return registry


def run(line: str, registry: Registry) -> RunConfig:
    return parse(line.split(), registry)


def from_file(text: str, tmp_path: Path, registry: Registry, *more: str) -> RunConfig:
    (tmp_path / "run.toml").write_text(text)
    return parse([*more[:1], "--config", str(tmp_path / "run.toml"), *more[1:]], registry)
