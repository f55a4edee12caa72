"""An optimizer is chosen per role, and reads the same from flags, a file and Python."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from config_fakes import fake_registry, from_file, run

from rlhf_core import AdamW, OptimizerProvider, Providers, Registry, TrainedOptions, UsageError, hookimpl
from rlhf_core.cli.help import algorithm as algorithm_help
from rlhf_core.config.builder import from_names, make_config, to_names, to_toml
from rlhf_core.config.parsing import read
from rlhf_core.config.resume import check_resume


@dataclass(frozen=True)
class Momentum(OptimizerProvider):
    """SGD with momentum."""

    schedule: Any = "linear"
    """its own default"""
    momentum: float = 0.9
    """of the gradients"""
    dampening: float = 0.0
    """of the momentum"""

    def __call__(self, named_parameters: Iterable[tuple[str, Any]], total_steps: int) -> Any:
        raise AssertionError("no model is built here")


@dataclass(frozen=True, kw_only=True)
class TrustRegion(OptimizerProvider):
    """One with an option that must be given."""

    radius: float
    """of the trust region"""

    def __call__(self, named_parameters: Iterable[tuple[str, Any]], total_steps: int) -> Any:
        raise AssertionError("no model is built here")


@dataclass(frozen=True)
class NoOptimizer:
    """A dataclass of another kind."""


class Optimizers:
    @hookimpl
    def rlhf_optimizer(self) -> Providers:
        return {"momentum": Momentum, "none": NoOptimizer, "trust_region": TrustRegion}


@pytest.fixture(scope="module")
def registry() -> Registry:
    registry = fake_registry()
    registry.register(Optimizers(), "optimizers")
    return registry


def test_flags_a_file_and_python_choose_the_same_optimizer(tmp_path: Path, registry: Registry) -> None:
    flags = run("online --data.where x --actor.optim.use momentum --actor.optim.momentum 0.5 --steps 7", registry)
    text = 'algorithm = "online"\nsteps = 7\ndata.where = "x"\n[actor.optim]\nuse = "momentum"\nmomentum = 0.5\n'
    file = from_file(text, tmp_path, registry)
    options = {"use": "momentum", "momentum": 0.5}
    python = make_config("online", registry, steps=7, data={"where": "x"}, actor={"optim": options})
    assert flags == file == python
    assert flags.roles["actor"].optim == Momentum(lr=3e-5, momentum=0.5)  # type: ignore[attr-defined]
    assert flags.uses == {"actor.optim": "momentum"}
    assert from_names(to_names(flags), registry) == flags, "a worker builds it again from names"
    assert from_file(to_toml(flags), tmp_path, registry) == flags


def test_an_instance_is_an_optimizer_too(registry: Registry) -> None:
    own = Momentum(lr=0.25, dampening=0.5)
    for actor in ({"optim": own}, TrainedOptions(optim=own)):
        config = make_config("online", registry, data={"where": "x"}, actor=actor)
        assert config.roles["actor"].optim == own  # type: ignore[attr-defined]
        assert config.uses == {"actor.optim": "momentum"}


def test_an_option_without_a_default_is_read_and_the_others_keep_the_algorithms_values(registry: Registry) -> None:
    config = run("online --data.where x --actor.optim.use trust_region --actor.optim.radius 2", registry)
    assert config.roles["actor"].optim == TrustRegion(lr=3e-5, radius=2.0)  # type: ignore[attr-defined]


def test_another_optimizer_keeps_the_algorithms_schedule_unless_it_has_its_own(registry: Registry) -> None:
    @dataclass(frozen=True)
    class Falling(type(registry.resolve("algorithm", "online")())):  # type: ignore[misc]
        """The algorithm with a schedule."""

        roles = {
            "actor": TrainedOptions(optim=AdamW(lr=2e-5, schedule="cosine", warmup=0.1, betas=(0.5, 0.6))),
        }

    config = make_config(Falling(), registry, data={"where": "x"}, actor={"optim": "momentum"})
    expected = Momentum(lr=2e-5, warmup=0.1)
    assert config.roles["actor"].optim == expected, "schedule is the optimizer's own, lr and warm-up are not"  # type: ignore[attr-defined]
    assert expected.schedule == "linear"


def test_a_flag_that_chooses_another_optimizer_drops_the_options_of_the_files_one(
    tmp_path: Path, registry: Registry
) -> None:
    text = 'algorithm = "online"\ndata.where = "x"\n[actor.optim]\nuse = "momentum"\nmomentum = 0.5\nlr = 0.1\n'
    config = from_file(text, tmp_path, registry, "online", "--actor.optim.use", "adamw")
    assert config.roles["actor"].optim == AdamW(lr=3e-5)  # type: ignore[attr-defined]
    same = from_file(text, tmp_path, registry, "online", "--actor.optim.use", "momentum")
    assert same.roles["actor"].optim == Momentum(lr=0.1, momentum=0.5)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--actor.optim.use momentumm", "no optimizer is called 'momentumm' (did you mean 'momentum'?)"),
        ("--actor.optim.momentum 0.5", "unknown flag --actor.optim.momentum"),
        ("--actor.optim.use momentum --actor.optim.betas 0 0", "unknown flag --actor.optim.betas"),
        ("--optimizer momentum", "unknown flag --optimizer; an optimizer belongs to a role: --actor.optim.use NAME"),
        (
            "--actor.optim.use none",
            "optimizer 'none' of (local) does not subclass OptimizerProvider; write class NoOptimizer(",
        ),
        ("--actor.optim.use momentum --actor.optim.lr -1", "--actor.optim.lr must be at least 0, not -1.0"),
        (
            "--actor.optim.use trust_region",
            "role 'actor' (trained) needs --actor.optim.radius FLOAT (of the trust region)",
        ),
        ("--reference.optim.use momentum", "unknown flag --reference.optim.use"),
    ],
)
def test_a_mistake_is_one_line(words: str, message: str, registry: Registry) -> None:
    with pytest.raises(UsageError) as caught:
        run(f"online --data.where x {words}", registry)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_help_shows_the_options_of_the_chosen_optimizer(registry: Registry) -> None:
    def text(*words: str) -> str:
        schema, settings = read(["online", *words], registry)
        return " ".join(algorithm_help(schema, settings, registry, everything=True).split())

    assert (
        "--actor.optim.use STR optimizer of this role: adamw, momentum, none, trust_region, or module:Class (default: adamw)"
        in text()
    )
    assert "--actor.optim.betas FLOAT FLOAT AdamW's decay rates of the two moments (default: 0.9 0.95)" in text()
    chosen = text("--actor.optim.use", "momentum")
    assert "--actor.optim.momentum FLOAT of the gradients (default: 0.9)" in chosen
    assert "--actor.optim.betas" not in chosen
    assert "--actor.optim.lr FLOAT peak learning rate (default: 3e-05)" in chosen


def test_a_run_is_not_resumed_with_another_optimizer(tmp_path: Path, registry: Registry) -> None:
    config = run(f"online --data.where x --output {tmp_path}", registry)
    other = run(f"online --data.where x --output {tmp_path} --actor.optim.use momentum", registry)
    for changed in (False, True):
        with pytest.raises(UsageError, match=r"has another optimizer: actor\.optim\.use adamw -> momentum; ") as caught:
            check_resume(replace(other, resume_changed=changed), to_toml(config))
        assert "\n" not in str(caught.value)
    check_resume(config, to_toml(config))
