"""A provider whose class breaks the contract is refused in one line, before anything is made of it."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest

from rlhf_core import (
    Algorithm,
    ModelOptions,
    ProviderChoices,
    Registry,
    Run,
    Term,
    TrainedOptions,
    UsageError,
    hookimpl,
    make_config,
)
from rlhf_core.cli import main
from rlhf_core.contract.hooks import KINDS
from rlhf_core.plugins.provider_checks import capabilities, check_class
from rlhf_core.plugins.registry import default_registry

HEAD = """
from __future__ import annotations
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar
from rlhf_core import *
from rlhf_core import KL, ModelOptions, TrainedOptions

"""
FROZEN = "@dataclass(frozen=True)\n"
ALGORITHM = 'class X(Algorithm):\n    roles = {"actor": TrainedOptions()}\n    defaults = {"data": "json"}\n'
CALL = {
    "reward": "    def __call__(self, rollouts): ...",
    "loss": "    def __call__(self, outputs, batch): ...",
    "advantage": "    def __call__(self, rewards, rollouts, extras): ...",
    "evaluator": "    def __call__(self, run): ...",
    "algorithm": "    def __call__(self, choices): ...",
}


def define(source: str) -> type:
    """The class X of a module's source."""
    module = ModuleType("somebodys_module")
    sys.modules[module.__name__] = module  # where `dataclass` looks up what an annotation means
    exec(HEAD + source, vars(module))
    found: type = vars(module)["X"]
    return found


MISTAKES = {
    "no dataclass": ("reward", "class X(Reward):\n", "is not a frozen dataclass; write @dataclass(frozen=True)"),
    "not frozen": ("reward", "@dataclass\nclass X(Reward):\n", "is not a frozen dataclass"),
    "no dataclass itself": (
        "reward",
        f"{FROZEN}class Y(Reward):\n    a: int = 1\nclass X(Y):\n    b: int = 2\n",
        "declares the option 'b' but is not a dataclass",
    ),
    "no base": ("reward", f"{FROZEN}class X:\n", "does not subclass Reward; write class X(Reward):"),
    "another kind's base": ("loss", f"{FROZEN}class X(Reward):\n", "does not subclass Loss; write class X(Loss):"),
    "an option called use": ("reward", f"{FROZEN}class X(Reward):\n    use: str = ''\n", "an option 'use'"),
    "an option like a method": ("reward", f"{FROZEN}class X(Reward):\n    check: bool = True\n", "an option 'check'"),
    "an option like a capability": ("loss", f"{FROZEN}class X(Loss):\n    needs: int = 1\n", "an option 'needs'"),
    "a singular": ("advantage", f"{FROZEN}class X(Advantage):\n    need = frozenset()\n", "did you mean 'needs'?"),
    "a missing s": (
        "advantage",
        f"{FROZEN}class X(Advantage):\n    raw_reward = True\n",
        "has 'raw_reward', which core does not read (did you mean 'raw_rewards'?)",
    ),
    "a letter too few": ("loss", f"{FROZEN}class X(Loss):\n    row_per_unit = 2\n", "did you mean 'rows_per_unit'?"),
    "underscores": ("loss", f"{FROZEN}class X(Loss):\n    rowsPerUnit = 2\n", "did you mean 'rows_per_unit'?"),
    "swapped letters": ("evaluator", f"{FROZEN}class X(Evaluator):\n    smaples = 2\n", "did you mean 'samples'?"),
    "a property": (
        "loss",
        f"{FROZEN}class X(Loss):\n    @property\n    def output(self): return frozenset()\n",
        "did you mean 'outputs'?",
    ),
    "a former name": ("loss", f"{FROZEN}class X(Loss):\n    wants = frozenset()\n", "did you mean 'outputs'?"),
    "a method where core reads a value": (
        "loss",
        f"{FROZEN}class X(Loss):\n    def needs(self): return frozenset()\n",
        "needs is a method, but core reads a value; write @property above it",
    ),
    "a value where core calls a method": (
        "reward",
        f"{FROZEN}class X(Reward):\n    close = 3\n",
        "close is 3, but core calls it; write def close(self):",
    ),
    "no set": (
        "loss",
        f"{FROZEN}class X(Loss):\n    needs = ('returns_NT',)\n",
        "needs is a tuple, not a set of names; write needs = frozenset({…})",
    ),
    "no count": (
        "loss",
        f"{FROZEN}class X(Loss):\n    rows_per_unit = '2'\n",
        "rows_per_unit is '2'; give a value of type int, such as 1",
    ),
    "no call": (
        "reward",
        f"{FROZEN}class X(Reward):\n    pass\n",
        "cannot be called; write def __call__(self, rollouts):",
    ),
    "two arguments": (
        "reward",
        f"{FROZEN}class X(Reward):\n    def __call__(self, prompts, texts): ...\n",
        "__call__(self, prompts, texts) is called with (self, rollouts); write def __call__(self, rollouts):",
    ),
    "a method of core's without its argument": (
        "advantage",
        f"{FROZEN}class X(Advantage):\n    def prepare(self): ...\n",
        "prepare(self) is called with (self, batch); write def prepare(self, batch):",
    ),
    "no roles": ("algorithm", f"{FROZEN}class X(Algorithm):\n    defaults = {{}}\n", "declares no roles"),
    "no defaults": ("algorithm", f"{FROZEN}class X(Algorithm):\n    roles = {{}}\n", "declares no defaults"),
    "an unknown kind": (
        "algorithm",
        f"{FROZEN}class X(Algorithm):\n    roles = {{}}\n    defaults = {{'rewrad': 'length'}}\n",
        "defaults has 'rewrad', which is not a kind (did you mean 'reward'?)",
    ),
    "a role without options": (
        "algorithm",
        f"{FROZEN}class X(Algorithm):\n    defaults = {{}}\n    roles = {{'actor': 'tiny'}}\n",
        "roles['actor'] is 'tiny'; write ModelOptions()",
    ),
    "an unknown option of core": (
        "algorithm",
        f"{FROZEN}{ALGORITHM}    config_defaults = {{'minibatch': 4}}\n",
        "config_defaults has 'minibatch', which is not an option of a run (did you mean 'minibatches'?)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_class_that_breaks_the_contract_is_refused_in_one_line(mistake: str) -> None:
    kind, source, message = MISTAKES[mistake]
    if "def __call__" not in source and mistake != "no call":
        source += CALL[kind]
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        check_class(kind, "'x' of mine 1.0", define(source))
    text = str(caught.value)
    assert text.startswith(f"{kind} 'x' of mine 1.0") and "\n" not in text


ALLOWED = {
    "a class attribute": ("loss", f"{FROZEN}class X(Loss):\n    needs = frozenset({{'returns_NT'}})\n"),
    "a class variable": ("loss", f"{FROZEN}class X(Loss):\n    rows_per_unit: ClassVar[int] = 2\n"),
    "a property": ("loss", f"{FROZEN}class X(Loss):\n    @property\n    def needs(self): return frozenset()\n"),
    "an option that core reads": (
        "loss",
        f"{FROZEN}class X(Loss):\n    aggregate: str = 'token'\n    length: int = 0\n",
    ),
    "an option without a default": ("algorithm", f"{FROZEN}{ALGORITHM}    kl: KL\n"),
    "private names": ("advantage", f"{FROZEN}class X(Advantage):\n    _need = 1\n    def _raw_reward(self): ...\n"),
    "further names": ("advantage", f"{FROZEN}class X(Advantage):\n    def scale(self): ...\n    reads = 1\n"),
    "an option that is nearly one": ("loss", f"{FROZEN}class X(Loss):\n    output: str = 'logits_NT'\n"),
    "any arguments": ("reward", f"{FROZEN}class X(Reward):\n    def __call__(self, *args): ...\n"),
    "another parameter's name": ("reward", f"{FROZEN}class X(Reward):\n    def __call__(self, batch, scale=1): ...\n"),
    "an undecorated subclass without options": (
        "reward",
        f"{FROZEN}class Y(Reward):\n    a: int = 1\n    def __call__(self, rollouts): ...\nclass X(Y):\n    pass\n",
    ),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_a_class_that_keeps_the_contract_passes(case: str) -> None:
    kind, source = ALLOWED[case]
    target = define(source if "def __call__" in source else source + CALL[kind])
    assert check_class(kind, "x", target) is target


def test_an_option_that_core_reads_may_be_required() -> None:
    cls = define(f"{FROZEN}{ALGORITHM}    kl: KL\n{CALL['algorithm']}")
    assert cls(kl=None).kl is None  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'kl'"):
        cls()


@pytest.mark.parametrize("kind", KINDS)
def test_no_installed_provider_is_taken_for_a_mistake(kind: str) -> None:
    registry = default_registry()
    names = registry.table(kind)
    checked = [check_class(kind, name, registry.resolve(kind, name)) for name in names]
    assert len(checked) == len(names)


def test_every_capability_of_a_kind_is_refused_when_a_letter_is_missing() -> None:
    """Check the longer names; `kl` without a letter is any name."""
    for kind, base in (("advantage", "Advantage"), ("loss", "Loss"), ("evaluator", "Evaluator")):
        bare = define(f"{FROZEN}class X({base}):\n{CALL[kind]}")
        for name in capabilities(bare.__mro__[1]):
            if len(name) < 5:
                continue
            source = f"{FROZEN}class X({base}):\n    {name[:-1]} = 1\n{CALL[kind]}"
            with pytest.raises(UsageError, match=f"did you mean '{name}'"):
                check_class(kind, "x", define(source))


# ----------------------------------------------------------------------------------------------------------------------
# wherever a class comes from
# ----------------------------------------------------------------------------------------------------------------------

BROKEN = f"{HEAD}{FROZEN}class X(Reward):\n    def __call__(self, prompts, texts): ...\n"


@dataclass(frozen=True)
class Duck:
    """Looks like a reward, and is none."""

    def __call__(self, rollouts: object) -> list[float]:
        return []


def test_the_command_line_answers_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("brokenreward.py").write_text(BROKEN)
    words = ["rlhf_core.testing.tiny_algorithm:TinyAlgorithm", "--model", "no/such-model"]
    assert main([*words, "--reward", "brokenreward:X", "--output", "run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "brokenreward:X: __call__(self, prompts, texts) is called with (self, rollouts)" in line
    assert not Path("run").exists()


def test_an_instance_from_python_is_checked_like_a_name() -> None:
    with pytest.raises(UsageError, match=r"reward Duck does not subclass Reward; write class Duck\(Reward\):"):
        make_config("rlhf_core.testing.tiny_algorithm:TinyAlgorithm", reward=Duck())


def test_a_class_that_a_plugin_registers_is_checked_when_it_is_chosen() -> None:
    def rlhf_reward() -> dict[str, type]:
        return {"duck": Duck}

    registry = Registry(autoload=False)
    registry.register(SimpleNamespace(rlhf_reward=hookimpl(rlhf_reward)), "pond", "rlhf-pond", "0.1")
    with pytest.raises(UsageError, match="reward 'duck' of rlhf-pond 0.1 does not subclass Reward"):
        registry.resolve("reward", "duck")


@dataclass(frozen=True)
class Idle(Algorithm):
    """Trains nothing."""

    defaults: ClassVar[Mapping[str, str]] = {"data": "prompts"}
    roles: ClassVar[Mapping[str, ModelOptions]] = {"actor": TrainedOptions()}

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return ()


def test_an_algorithm_without_terms_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    run = Run(make_config(Idle(), model="no/such-model", output=str(tmp_path / "run")))
    with pytest.raises(UsageError, match="the algorithm Idle returns no terms, so nothing would be trained"):
        run.train()
    assert not (tmp_path / "run").exists()
