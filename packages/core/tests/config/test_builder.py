"""Flags, TOML and Python build the same configuration."""

from __future__ import annotations

import math
import os
import string
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from config_fakes import (
    Colour,
    Guarded,
    Inner,
    InnerEvaluator,
    Online,
    PlainEvaluator,
    Rich,
    RichEvaluator,
    fake_registry,
    from_file,
    run,
)

from rlhf_core.config.builder import from_names, make_config, parse, to_names
from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import ModelOptions, Sampling, TrainedOptions
from rlhf_core.contract.providers import Reward
from rlhf_core.errors import ContractError, UsageError
from rlhf_core.plugins.registry import Registry


@pytest.fixture(scope="module")
def registry() -> Registry:
    return fake_registry()


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
    python = make_config(
        Online(clip=0.1, kl=None),
        registry,
        steps=7,
        resume=True,
        data={"where": "here"},
        reward=Rich(number=0.25, words=("a", "b"), inner=Inner(4)),
        actor={"optim": AdamW(lr=1e-4)},
        sampling=Sampling(n=6),
    )
    assert flags == file == python
    assert flags.algorithm == Online(clip=0.1, kl=None)
    assert flags.providers["reward"] == Rich(number=0.25, words=("a", "b"), inner=Inner(4))
    assert flags.roles == {"actor": TrainedOptions(optim=AdamW(lr=1e-4)), "reference": ModelOptions()}
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
    assert set(config.providers) == {"data", "sampler", "strategy", "launcher"}
    always = {"sampler": "shuffled", "strategy": "torch", "launcher": "local"}
    assert dict(config.names) == {"algorithm": "offline", "data": "asks", **always}
    assert config.roles["reward"] == TrainedOptions(optim=AdamW(lr=1))


def test_evaluators_are_a_tuple_with_their_options_by_name_where_there_are_several(registry: Registry) -> None:
    one = run("offline --data.where x --evaluator inner --evaluator.depth 3", registry)
    assert one.providers["evaluator"] == (InnerEvaluator(3),)
    two = run(
        "offline --data.where x --evaluator inner,rich --evaluator.inner.depth 3 --evaluator.rich.count 9", registry
    )
    assert two.providers["evaluator"] == (InnerEvaluator(3), RichEvaluator(count=9))
    assert two == make_config(
        "offline", registry, data={"where": "x"}, evaluator=[InnerEvaluator(3), RichEvaluator(count=9)]
    )
    bare = run("offline --data.where x --evaluator plain,inner", registry)
    assert bare.providers["evaluator"] == (PlainEvaluator(), InnerEvaluator())
    for config in (one, two, bare):
        assert from_names(to_names(config), registry) == config
    assert "evaluator" not in run("offline --data.where x --evaluator none", registry).providers


def test_several_evaluators_are_written_as_names_lists_and_tables(tmp_path: Path, registry: Registry) -> None:
    wanted = make_config(
        "offline", registry, data={"where": "x"}, evaluator=[InnerEvaluator(3), RichEvaluator(count=9)]
    )
    for words in ("inner rich", "inner, rich", "inner,rich"):
        flags = f"offline --data.where x --evaluator {words} --evaluator.inner.depth 3 --evaluator.rich.count 9"
        assert run(flags, registry) == wanted
    head = "algorithm = 'offline'\ndata.where = 'x'\n"
    files = [
        "[[evaluator]]\nuse = 'inner'\ndepth = 3\n[[evaluator]]\nuse = 'rich'\ncount = 9\n",
        "[evaluator]\nuse = ['inner', 'rich']\ninner.depth = 3\nrich.count = 9\n",
    ]
    for file in files:
        assert from_file(head + file, tmp_path, registry) == wanted
    tables: list[Any] = [{"use": "inner", "depth": 3}, {"use": "rich", "count": 9}]
    named = {"use": ["inner", "rich"], "inner": {"depth": 3}, "rich": {"count": 9}}
    for several in (tables, [InnerEvaluator(3), tables[1]], named):
        assert make_config("offline", registry, data={"where": "x"}, evaluator=several) == wanted
    one = make_config("offline", registry, data={"where": "x"}, evaluator=tables[:1])
    assert one == run("offline --data.where x --evaluator inner --evaluator.depth 3", registry)
    assert "evaluator" not in make_config("offline", registry, data={"where": "x"}, evaluator=[]).providers
    with pytest.raises(UsageError, match=r"evaluator 2 of the list needs a name as `use`"):
        make_config("offline", registry, data={"where": "x"}, evaluator=["inner", {"count": 9}])


def test_two_evaluators_of_one_name_have_options_of_their_own(tmp_path: Path, registry: Registry) -> None:
    wanted = (InnerEvaluator(3), RichEvaluator(), InnerEvaluator(5))
    config = make_config("offline", registry, data={"where": "x"}, evaluator=list(wanted))
    assert config.providers["evaluator"] == wanted
    assert config.names_of("evaluator") == ["inner.1", "rich", "inner.2"]
    assert [path for path, _ in config.provider_paths("evaluator")] == [
        "/evaluator.inner.1", "/evaluator.rich", "/evaluator.inner.2",
    ]  # fmt: skip
    flags = "--evaluator inner,rich,inner --evaluator.inner.1.depth 3 --evaluator.inner.2.depth 5"
    assert run(f"offline --data.where x {flags}", registry) == config
    file = "algorithm = 'offline'\ndata.where = 'x'\n" + "".join(
        f"[[evaluator]]\nuse = '{name}'\n{options}\n"
        for name, options in (("inner", "depth = 3"), ("rich", ""), ("inner", "depth = 5"))
    )
    assert from_file(file, tmp_path, registry) == config
    assert from_names(to_names(config), registry) == config


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
# Python
# ----------------------------------------------------------------------------------------------------------------------


def test_an_unregistered_instance_is_named_by_its_module_and_class(registry: Registry) -> None:
    @dataclass(frozen=True)
    class Mine(Reward):
        """Not registered."""

        def __call__(self, rollouts: Any) -> Any: ...

    config = make_config("online", registry, data="plain", reward=Mine())
    assert config.providers["reward"] == Mine()
    assert config.names["reward"].startswith(f"{__name__}:")


def test_an_option_whose_type_exists_only_for_checkers_is_the_authors_mistake(registry: Registry) -> None:
    @dataclass(frozen=True)
    class Blind(Reward):
        """Its option has a type that nobody knows."""

        option: Unknown = 1  # type: ignore[name-defined]  # noqa: F821
        """cannot be read"""

        def __call__(self, rollouts: Any) -> Any: ...

    with pytest.raises(
        ContractError, match=r"Blind\.option: the type 'Unknown' of an option must be known at run time"
    ):
        make_config("online", registry, data="plain", reward=Blind())


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
