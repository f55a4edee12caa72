"""Flags, TOML and Python build the same configuration, and a written one builds it again."""

from __future__ import annotations

import math
import os
import pickle
import string
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_core.configure import from_names, make, parse, to_names, to_toml
from rlhf_core.errors import ContractError, UsageError
from rlhf_core.hookspecs import hookimpl
from rlhf_core.options import KL, ModelOptions, Optim, RunConfig, Sampling, TrainedOptions
from rlhf_core.registry import Registry
from rlhf_core.values import Secret, reveal


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
class Rich:
    """A reward with an option of every type."""

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
class Asks:
    """Data that must be told where."""

    where: str
    """the place"""
    rows: int = 10
    """how many"""


@dataclass(frozen=True)
class Guarded:
    """A reward with a key and an opinion."""

    key: Annotated[str, Secret()] = ""
    """password of the judge"""
    limit: int = 1
    """what is allowed"""

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"limit must be positive, not {self.limit}")


@dataclass(frozen=True)
class Plain:
    """A provider without options."""


@dataclass(frozen=True)
class Online:
    """An algorithm that samples."""

    clip: float = 0.2
    """where the ratio is cut"""
    kl: KL | None = KL()
    """the leash"""

    defaults: ClassVar[Mapping[str, str]] = {"data": "asks", "rollout": "plain", "reward": "rich"}
    roles: ClassVar[Mapping[str, Any]] = {"actor": TrainedOptions(optim=Optim(lr=3e-5)), "reference": ModelOptions()}
    config_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 8, "sampling": Sampling(n=2)}


@dataclass(frozen=True)
class Offline:
    """An algorithm that reads."""

    defaults: ClassVar[Mapping[str, str]] = {"data": "asks"}
    roles: ClassVar[Mapping[str, Any]] = {"reward": TrainedOptions()}


TABLES: dict[str, dict[str, type]] = {
    "data": {"asks": Asks, "plain": Plain},
    "rollout": {"plain": Plain},
    "reward": {"rich": Rich, "guarded": Guarded},
    "algorithm": {"online": Online, "offline": Offline},
    "evaluator": {"inner": Inner, "rich": Rich, "plain": Plain},
}


@pytest.fixture(scope="module")
def registry() -> Registry:
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


# ----------------------------------------------------------------------------------------------------------------------
# the same from everywhere
# ----------------------------------------------------------------------------------------------------------------------


def test_flags_a_file_and_python_build_the_same_run(tmp_path: Path, registry: Registry) -> None:
    flags = run(
        "online --steps 7 --resume --data.where here --reward.number 0.25 --reward.words a b --reward.inner.depth 4 "
        "--actor.optim.lr 1e-4 --sampling.n 6 --algorithm.clip 0.1 --algorithm.kl none",
        registry,
    )
    file = from_file(
        """
        algorithm = { use = "online", clip = 0.1, kl = "none" }
        steps = 7
        resume = true
        data.where = "here"
        actor.optim.lr = 1e-4
        [reward]
        use = "rich"
        number = 0.25
        words = ["a", "b"]
        [reward.inner]
        depth = 4
        [sampling]
        n = 6
        """,
        tmp_path,
        registry,
    )
    python = make(
        Online(clip=0.1, kl=None),
        registry,
        steps=7,
        resume=True,
        data={"where": "here"},
        reward=Rich(number=0.25, words=("a", "b"), inner=Inner(4)),
        actor={"optim": Optim(lr=1e-4)},
        sampling=Sampling(n=6),
    )
    assert flags == file == python
    assert flags.algorithm == Online(clip=0.1, kl=None)
    assert flags.providers["reward"] == Rich(number=0.25, words=("a", "b"), inner=Inner(4))
    assert flags.roles == {"actor": TrainedOptions(optim=Optim(lr=1e-4)), "reference": ModelOptions()}
    assert (flags.steps, flags.resume, flags.batch_size, flags.sampling.n) == (7, True, 8, 6)


def test_later_wins_defaults_file_flags(tmp_path: Path, registry: Registry) -> None:
    text = 'algorithm = "online"\nsteps = 7\nseed = 3\ndata = { use = "asks", where = "there" }\n'
    config = from_file(text, tmp_path, registry, "online", "--steps", "9")
    assert (config.steps, config.seed, config.batch_size) == (9, 3, 8)


def test_a_flag_that_chooses_another_provider_drops_the_options_of_the_files_one(
    tmp_path: Path, registry: Registry
) -> None:
    text = 'algorithm = "online"\ndata.where = "there"\n[reward]\nuse = "rich"\ncount = 4\n'
    config = from_file(text, tmp_path, registry, "online", "--reward", "guarded")
    assert config.providers["reward"] == Guarded()


def test_only_what_the_algorithm_uses_is_there(registry: Registry) -> None:
    config = run("offline --data.where here --reward.optim.lr 1", registry)
    assert set(config.providers) == {"data", "strategy", "launcher"}
    assert dict(config.names) == {"algorithm": "offline", "data": "asks", "strategy": "torch", "launcher": "local"}
    assert config.roles["reward"] == TrainedOptions(optim=Optim(lr=1))


def test_evaluators_are_a_tuple_with_their_options_by_name_where_there_are_several(registry: Registry) -> None:
    one = run("offline --data.where x --evaluator inner --evaluator.depth 3", registry)
    assert one.providers["evaluator"] == (Inner(3),)
    two = run(
        "offline --data.where x --evaluator inner,rich --evaluator.inner.depth 3 --evaluator.rich.count 9", registry
    )
    assert two.providers["evaluator"] == (Inner(3), Rich(count=9))
    assert two == make("offline", registry, data={"where": "x"}, evaluator=[Inner(3), Rich(count=9)])
    bare = run("offline --data.where x --evaluator plain,inner", registry)
    assert bare.providers["evaluator"] == (Plain(), Inner())
    for config in (one, two, bare):
        assert from_names(to_names(config), registry) == config
    assert "evaluator" not in run("offline --data.where x --evaluator none", registry).providers


def test_a_value_may_follow_an_equals_sign_and_begin_with_dashes(registry: Registry) -> None:
    config = parse(["online", "--data.where=--there", "--reward.text=", "--reward.count=-4"], registry)
    assert config.providers["data"].where == "--there"
    assert (config.providers["reward"].text, config.providers["reward"].count) == ("", -4)


def test_dashes_and_underscores_are_the_same_in_flags(registry: Registry) -> None:
    line = "online --data.where x --batch_size 3 --actor.optim.max-grad-norm 2 --sampling.max_new_tokens 5"
    config = run(line, registry)
    assert (config.batch_size, config.roles["actor"].optim.max_grad_norm, config.sampling.max_new_tokens) == (3, 2.0, 5)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("words", "value"), [([], True), (["True"], True), (["false"], False)])
def test_a_switch_works_bare_and_with_a_value(words: list[str], value: bool, registry: Registry) -> None:
    assert parse(["offline", "--data.where", "x", "--resume", *words], registry).resume is value


READS = {
    "--reward.choice 3": ("choice", 3),
    "--reward.choice right": ("choice", "right"),
    "--reward.colour BLUE": ("colour", Colour.BLUE),
    "--reward.maybe 4": ("maybe", 4),
    "--reward.maybe none": ("maybe", None),
    "--reward.either 4": ("either", 4),
    "--reward.either four": ("either", "four"),
    "--reward.words": ("words", ()),
    "--reward.pair 2 1e-3": ("pair", (2, 0.001)),
    "--reward.bag 3 4 3": ("bag", frozenset({3, 4})),
    "--reward.weights a=1 b=-2.5": ("weights", {"a": 1.0, "b": -2.5}),
    "--reward.path /tmp/z": ("path", Path("/tmp/z")),
    "--reward.number inf": ("number", math.inf),
    "--reward.optional.depth 5": ("optional", Inner(5)),
}


@pytest.mark.parametrize("flags", READS)
def test_words_are_read_by_the_type_of_the_option(flags: str, registry: Registry) -> None:
    name, value = READS[flags]
    reward = run(f"online --data.where x {flags}", registry).providers["reward"]
    assert getattr(reward, name) == value
    assert type(getattr(reward, name)) is type(value)


# ----------------------------------------------------------------------------------------------------------------------
# there and back
# ----------------------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NUMBER = st.floats(allow_nan=False)
COUNT = st.integers(-(2**63), 2**63 - 1)
RICH = st.builds(
    Rich,
    text=TEXT,
    number=NUMBER,
    count=COUNT,
    on=st.booleans(),
    path=TEXT.map(Path),
    choice=st.sampled_from(["left", "right", 3]),
    colour=st.sampled_from(Colour),
    maybe=st.none() | COUNT,
    either=COUNT | TEXT.filter(lambda text: text.lower() != "none"),
    words=st.lists(TEXT, max_size=3).map(tuple),
    pair=st.tuples(COUNT, NUMBER),
    bag=st.frozensets(COUNT, max_size=3),
    weights=st.dictionaries(TEXT, NUMBER, max_size=3),
    inner=st.builds(Inner, COUNT),
    optional=st.none() | st.builds(Inner, COUNT),
)
CONFIGS = st.fixed_dictionaries(
    {
        "reward": RICH,
        "data": st.builds(Asks, TEXT, COUNT),
        "algorithm": st.builds(
            Online, clip=NUMBER, kl=st.none() | st.builds(KL, st.floats(0, 9), target=st.none() | NUMBER)
        ),
        "steps": st.integers(0, 10**6),
        "output": TEXT,
        "actor": st.fixed_dictionaries(
            {"optim": st.fixed_dictionaries({"lr": st.floats(0, 1), "betas": st.tuples(NUMBER, NUMBER)})}
        ),
        "sampling": st.builds(Sampling, st.integers(1, 99), stop=st.lists(TEXT, max_size=3).map(tuple)),
    }
)


@given(choice=CONFIGS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_to_toml_is_read_as_the_same_run(
    choice: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    config = make(
        choice["algorithm"], registry, **{name: value for name, value in choice.items() if name != "algorithm"}
    )
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    assert parse(["--config", str(tmp_path / "config.toml")], registry) == config


def test_names_are_plain_pickle_and_give_the_run_in_another_process(registry: Registry) -> None:
    config = run("online --data.where here --reward.optional.depth 2 --algorithm.kl.target 6", registry)
    names = to_names(config)
    assert from_names(pickle.loads(pickle.dumps(names)), registry) == config
    assert _kinds_of_values(names) <= {str, int, float, bool}


def _kinds_of_values(value: Any) -> set[type]:
    if isinstance(value, dict):
        return set().union(*map(_kinds_of_values, value.values()))
    if isinstance(value, list):
        return set().union(*map(_kinds_of_values, value))
    return {type(value)}


def test_every_option_of_the_run_is_written(registry: Registry) -> None:
    names = to_names(run("online --data.where x", registry))
    own = {each.name for each in fields(RunConfig)} - {"algorithm", "providers", "names", "roles"}
    assert own <= set(names)
    assert set(names["reward"]) == {"use", *(each.name for each in fields(Rich))}
    assert set(names["actor"]["optim"]) == {each.name for each in fields(Optim)}
    assert names["evaluator"] == "none"
    assert "seed" not in names["sampling"], "the loop sets it: it is no option"


def test_what_no_file_can_hold_is_refused_when_it_is_written(registry: Registry) -> None:
    config = make("online", registry, data={"where": "x"}, reward=replace(Rich(), text=print))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"reward\.text is a builtin_function_or_method, which no file can hold"):
        to_toml(config)


# ----------------------------------------------------------------------------------------------------------------------
# secrets
# ----------------------------------------------------------------------------------------------------------------------


def test_a_secret_is_masked_in_the_file_and_kept_for_workers(registry: Registry) -> None:
    config = run("online --data.where x --reward guarded --reward.key hunter2", registry)
    assert "hunter2" not in to_toml(config)
    assert from_names(to_names(config), registry) == config


def test_a_masked_secret_must_be_given_again(tmp_path: Path, registry: Registry) -> None:
    text = to_toml(run("online --data.where x --reward guarded --reward.key hunter2", registry))
    with pytest.raises(UsageError, match=r"reward\.key is masked; give it as --reward\.key env:NAME"):
        from_file(text, tmp_path, registry)


def test_a_secret_by_environment_variable_is_written_and_resolves_at_use(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run("online --data.where x --reward guarded --reward.key env:JUDGE_KEY", registry)
    assert 'key = "env:JUDGE_KEY"' in to_toml(config)
    with pytest.raises(UsageError, match="the environment variable JUDGE_KEY is not set"):
        reveal(config.providers["reward"].key)
    monkeypatch.setenv("JUDGE_KEY", "hunter2")
    assert reveal(config.providers["reward"].key) == "hunter2"
    assert reveal("plain") == "plain"


# ----------------------------------------------------------------------------------------------------------------------
# Python
# ----------------------------------------------------------------------------------------------------------------------


def test_an_unregistered_instance_is_named_by_its_module_and_class(registry: Registry) -> None:
    @dataclass(frozen=True)
    class Mine:
        """Not registered."""

    config = make("online", registry, data="plain", reward=Mine())
    assert config.providers["reward"] == Mine()
    assert config.names["reward"].startswith(f"{__name__}:")


def test_an_option_whose_type_exists_only_for_checkers_is_the_authors_mistake(registry: Registry) -> None:
    @dataclass(frozen=True)
    class Blind:
        """Its option has a type that nobody knows."""

        option: Unknown = 1  # type: ignore[name-defined]  # noqa: F821
        """cannot be read"""

    with pytest.raises(
        ContractError, match=r"Blind\.option: the type 'Unknown' of an option must be known at run time"
    ):
        make("online", registry, data="plain", reward=Blind())


def test_making_a_configuration_imports_no_torch() -> None:
    code = """
import sys
from rlhf_core import Registry, RunConfig, Rollouts, Run, Sampling, hookimpl, make_config
assert not {"torch", "transformers"} & set(sys.modules), "imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ""})


def test_the_public_names_exist_are_sorted_and_are_what_is_listed() -> None:
    import rlhf_core

    assert all(getattr(rlhf_core, name) is not None for name in rlhf_core.__all__)
    assert set(dir(rlhf_core)) == set(rlhf_core.__all__)
    constants_last = sorted(
        rlhf_core.__all__, key=lambda name: (not name.isupper(), name[0] in string.ascii_lowercase, name)
    )
    assert rlhf_core.__all__ == constants_last, "constants, classes, functions: each sorted, as ruff does it"
