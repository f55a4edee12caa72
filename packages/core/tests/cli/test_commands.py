"""Commands come through the hook `rlhf_command`: a plugin's as core's own, which nobody can replace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from rlhf_core import Command, CommandContext, ModelOptions, NameConflict, PluginError, hookimpl
from rlhf_core import plugin as core
from rlhf_core.cli import main
from rlhf_core.contract.providers import Algorithm
from rlhf_core.models.loading.load import load_model
from rlhf_core.plugins.registry import Registry

PLUGIN = '''
"""Commands to try the command line with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rlhf_core import Command, CommandContext, ModelOptions, UsageError, hookimpl


@dataclass(frozen=True)
class Repeat(Command):
    """Print a word again and again. Not for ever."""

    word: str
    """what is printed"""
    times: int = 2
    """how often"""
    data: str = "-"
    """what stands between; a name that a kind has too"""

    def __call__(self, context: CommandContext) -> int:
        if self.times > 9:
            raise UsageError("--times: at most 9")
        print(self.data.join([self.word] * self.times))
        return self.times


@dataclass(frozen=True)
class Answer(Command):
    """Answer the first prompt of the data."""

    model: str = "tiny"
    """whose answer"""
    seed: int = 3
    """the same seed gives the same answer"""

    defaults: ClassVar[Mapping[str, str | None]] = {
        "data": "prompts", "rollout": "hf", "strategy": "torch", "launcher": "local", "reward": None,
    }
    roles: ClassVar[Mapping[str, ModelOptions]] = {"actor": ModelOptions()}

    def __call__(self, context: CommandContext) -> int:
        with context.open_run() as run:
            numbers = [float(tensor.double().sum()) for _, tensor in run.roles["actor"].weights()]
        config = context.config
        print(json.dumps({"sum": sum(numbers), "seed": config.seed, "names": dict(config.names)}))
        return 0


@dataclass(frozen=True)
class Silent(Command):
    """Forgets its exit code."""

    def __call__(self, context: CommandContext) -> int:
        pass


@hookimpl
def rlhf_command():
    return {"repeat": Repeat, "answer": Answer, "silent": Silent}
'''


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "command_fakes.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "command_fakes", raising=False)
    monkeypatch.setenv("RLHF_DISABLE_PLUGIN_AUTOLOAD", "1")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`call("repeat", "x")`: exit code, standard output and standard error."""

    def run(*words: str) -> tuple[int, str, str]:
        code = main(["-p", "command_fakes", *words])
        return (code, *capsys.readouterr())

    return run


Call = Callable[..., tuple[int, str, str]]


def test_rlhf_command_is_called_with_its_options_and_its_result_is_the_exit_code(call: Call) -> None:
    assert call("repeat", "ha") == (2, "ha-ha\n", "")
    assert call("repeat", "ha", "--times", "3", "--data", "+") == (3, "ha+ha+ha\n", "")
    assert call("command_fakes/repeat", "ha") == (2, "ha-ha\n", "")


def test_commands_of_plugins_are_listed_and_document_themselves(call: Call) -> None:
    assert "\n  repeat                          Print a word again and again. Not for ever\n" in call("--help")[1]
    assert call("plugins", "--kind", "command")[1].count("rlhf-core") == len(core.rlhf_command())
    code, text, _ = call("repeat", "--help")
    assert code == 0 and text.startswith("usage: rlhf-run repeat WORD [flags]\n\nPrint a word again and again.")
    assert " ".join(text.split()).endswith(
        "options WORD what is printed --times INT how often (default: 2) "
        "--data STR what stands between; a name that a kind has too (default: -)"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("repeat", "repeat needs WORD, what is printed: rlhf-run repeat WORD"),
        ("repeat a b", "unexpected 'b': rlhf-run repeat WORD"),
        ("repeat a --times many", "--times expects INT, not 'many'"),
        ("repeat a --tims 2", "unknown flag --tims; did you mean --times INT (how often)?"),
        ("repeat a --times 10", "--times: at most 9"),
        ("repet a", "no algorithm or command is called 'repet'; did you mean 'repeat'?"),
        ("answer --loss x", "answer has no loss; it uses data, rollout, strategy, launcher, reward"),
        ("answer --data.zzz 3", "unknown flag --data.zzz; data 'prompts' has the options encoding.template,"),
    ],
)
def test_a_mistake_with_a_plugins_command_is_one_line(words: str, message: str, call: Call) -> None:
    code, out, err = call(*words.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"rlhf-run: {message}") and err.count("\n") == 1


def test_a_command_that_returns_no_exit_code_is_named() -> None:
    with pytest.raises(TypeError, match=r"command 'silent' of \(local\) must return an exit code, not None"):
        main(["-p", "command_fakes", "silent"])


def test_a_command_opens_a_run_of_the_providers_and_roles_that_it_declares(call: Call) -> None:
    code, out, _ = call("answer", "--seed", "5", "--actor.model", "tiny:hidden=16,layers=1")
    answer = json.loads(out.splitlines()[-1])
    model = load_model("tiny:hidden=16,layers=1", ModelOptions())
    expected = sum(float(tensor.detach().double().sum()) for tensor in model.parameters())
    assert code == 0
    assert answer["sum"] == pytest.approx(expected)
    assert answer["seed"] == 5
    assert answer["names"] == {
        "algorithm": "answer",
        "data": "prompts",
        "rollout": "hf",
        "strategy": "torch",
        "launcher": "local",
    }


# ----------------------------------------------------------------------------------------------------------------------
# names
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nothing(Command):
    """Does nothing."""

    def __call__(self, context: CommandContext) -> int:
        return 0


@dataclass(frozen=True)
class Plain(Algorithm):
    """An algorithm without terms."""

    defaults: ClassVar[Mapping[str, str]] = {}
    roles: ClassVar[Mapping[str, Any]] = {"actor": ModelOptions()}

    def __call__(self, choices: object) -> tuple[()]:
        return ()


def plugin(**tables: Mapping[str, type]) -> Any:
    hooks: dict[str, Any] = {}
    for kind, table in tables.items():

        def provide(table: Mapping[str, type] = table) -> Mapping[str, type]:
            return table

        hooks[f"rlhf_{kind}"] = hookimpl(provide)
    return SimpleNamespace(**hooks)


@pytest.mark.parametrize("kind", ["command", "algorithm"])
def test_no_plugin_replaces_a_command_of_core(kind: str) -> None:
    registry = Registry(autoload=False)
    with pytest.raises(PluginError) as caught:
        registry.register(plugin(**{kind: {"doctor": Nothing}}), "mine")
    assert str(caught.value) == f"rlhf_{kind}() gives 'doctor', but a plugin cannot replace this command of rlhf-core"
    assert registry.resolve("command", "doctor").__module__ == "rlhf_core.cli.doctor"
    assert "mine" not in registry.plugins


def test_a_command_and_an_algorithm_of_one_name_never_shadow_each_other() -> None:
    registry = Registry(autoload=False)
    with pytest.raises(PluginError, match=r"rlhf_command\(\) and rlhf_algorithm\(\) both give 'twice'; rename one"):
        registry.register(plugin(command={"twice": Nothing}, algorithm={"twice": Plain}), "both")
    registry.register(plugin(command={"shared": Nothing}), "a", "rlhf-a", "1.0")
    registry.register(plugin(algorithm={"shared": Plain}), "b", "rlhf-b", "2.0")
    with pytest.raises(NameConflict) as caught:
        registry.is_command("shared")
    assert str(caught.value) == (
        "command and algorithm 'shared' is provided by rlhf-a 1.0 (plugin 'a') and rlhf-b 2.0 (plugin 'b'); "
        "choose 'a/shared' or 'b/shared', or block one with -p no:b"
    )
    assert [[each.kind for each in entries] for entries in registry.conflicts] == [["command", "algorithm"]]
    assert registry.is_command("a/shared") and not registry.is_command("b/shared")


def children_seconds() -> float:
    """Processor time of child processes that have ended; unlike time that passes, it does not depend on other work."""
    times = os.times()
    return times.children_user + times.children_system


def test_help_of_a_plugins_command_is_quick_and_brings_no_torch() -> None:
    code = (
        "import sys; from rlhf_core.cli import main; assert main(['-p', 'command_fakes', *sys.argv[1:]]) == 0; "
        "assert 'torch' not in sys.modules"
    )
    for words in (["repeat", "--help"], ["answer", "--help"]):
        before = children_seconds()
        subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)
        assert children_seconds() - before < 3, "less than one; torch alone takes several"
