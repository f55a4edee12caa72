"""A configuration that is written builds the same run again, and shows no secret."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from config_fakes import Asks, Colour, Inner, Online, Rich, fake_registry, from_file, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_core.config.builder import from_names, make_config, parse, to_names, to_toml
from rlhf_core.config.schema import STRUCTURE
from rlhf_core.config.value_types import reveal
from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import KL, RunConfig, Sampling
from rlhf_core.errors import UsageError
from rlhf_core.plugins.registry import Registry


@pytest.fixture(scope="module")
def registry() -> Registry:
    return fake_registry()


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
    config = make_config(
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
    own = {each.name for each in fields(RunConfig)} - {*STRUCTURE, "episode"}  # which needs an environment
    assert own <= set(names)
    assert set(names["reward"]) == {"use", *(each.name for each in fields(Rich))}
    assert set(names["actor"]["optim"]) == {"use", *(each.name for each in fields(AdamW))}
    assert names["evaluator"] == "none"
    assert "seed" not in names["sampling"], "the loop sets it: it is no option"


def test_what_no_file_can_hold_is_refused_when_it_is_written(registry: Registry) -> None:
    config = make_config("online", registry, data={"where": "x"}, reward=replace(Rich(), text=print))  # type: ignore[arg-type]
    with pytest.raises(
        UsageError, match=r"reward\.text is a builtin_function_or_method, which cannot be stored in a file"
    ):
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
    with pytest.raises(UsageError, match=r"reward\.key is hidden in this file; give it as --reward\.key env:NAME"):
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
