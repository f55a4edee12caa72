"""The command line: what it prints, how it ends, and what it does not import."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import plugin as core
from rlhf_core.cli import main
from rlhf_core.contract.options import RunConfig
from rlhf_core.errors import RunStopped

PLUGIN = '''
"""Providers to try the command line with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlhf_core import AdamW, Algorithm, Data, ModelOptions, Reward, Rollout, Sampling, TrainedOptions, hookimpl


@dataclass(frozen=True)
class Rows(Data):
    """Rows of nothing."""

    path: str
    """where the rows are"""

    def __call__(self, split):
        return []


@dataclass(frozen=True)
class Engine(Rollout):
    """Samples nothing."""

    path: str
    """where the engine is"""

    def __call__(self, role, prompts, sampling):
        return None


@dataclass(frozen=True)
class Brevity(Reward):
    """Short is good. Shorter is better."""

    limit: int = 400
    """characters at which the reward reaches zero"""

    def __call__(self, rollouts):
        return [0.0]


@dataclass(frozen=True)
class Online(Algorithm):
    """Samples and learns.

    As the paper says.
    """

    clip: float = 0.2
    """where the ratio is cut"""

    defaults: ClassVar[Mapping[str, str]] = {"data": "table", "reward": "brevity", "rollout": "rows"}
    roles: ClassVar[Mapping[str, Any]] = {"actor": TrainedOptions(optim=AdamW(lr=3e-5)), "reference": ModelOptions()}
    config_defaults: ClassVar[Mapping[str, Any]] = {"sampling": Sampling(n=6)}

    def __call__(self, choices):
        return ()


@hookimpl
def rlhf_data():
    return {"table": Rows}


@hookimpl
def rlhf_rollout():
    return {"rows": Engine}


@hookimpl
def rlhf_reward():
    return {"brevity": Brevity}


@hookimpl
def rlhf_algorithm():
    return {"online": Online}


@hookimpl
def rlhf_run_start(run):
    pass
'''


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder with the plugin module in it; only what is asked for is loaded."""
    (tmp_path / "cli_fakes.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "cli_fakes", raising=False)
    monkeypatch.setenv("RLHF_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`say("plugins", "--json")`: the standard output of a command that succeeds."""

    def run(*words: str) -> str:
        assert main(["-p", "cli_fakes", *words]) == 0
        return capsys.readouterr().out

    return run


# ----------------------------------------------------------------------------------------------------------------------
# training
# ----------------------------------------------------------------------------------------------------------------------


class FakeRun:
    """Stands where Run stands; keeps what it was given."""

    seen: RunConfig
    outcome: BaseException | None = None

    def __init__(self, config: RunConfig, registry: Any) -> None:
        type(self).seen = config

    def train(self) -> None:
        if self.outcome is not None:
            raise self.outcome


def test_an_algorithm_trains_with_the_options_given(say: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_core.run.run.Run", FakeRun)
    words = "online --data.path x --rollout.path y --reward.limit 9 --steps 3 --actor.optim.lr 1e-4"
    assert say(*words.split()) == ""
    assert FakeRun.seen.steps == 3
    assert FakeRun.seen.providers["reward"].limit == 9
    assert FakeRun.seen.roles["actor"].optim.lr == 1e-4  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("outcome", "code", "line"),
    [
        (RunStopped("stopped by SIGTERM after step 3", 143), 143, "rlhf-run: stopped by SIGTERM after step 3\n"),
        (KeyboardInterrupt(), 130, "rlhf-run: interrupted\n"),
    ],
)
def test_a_run_that_was_stopped_says_so_and_exits_with_its_code(
    outcome: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rlhf_core.run.run.Run", FakeRun)
    monkeypatch.setattr(FakeRun, "outcome", outcome)
    assert main("-p cli_fakes online --model tiny --data.path x --rollout.path y".split()) == code
    assert capsys.readouterr().err == line


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_core.run.run.Run", FakeRun)
    monkeypatch.setattr(FakeRun, "outcome", ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main("-p cli_fakes online --model tiny --data.path x --rollout.path y".split())


# ----------------------------------------------------------------------------------------------------------------------
# help
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_the_overview_lists_algorithms_commands_and_the_fixed_flags(words: list[str], say: Callable[..., str]) -> None:
    text = say(*words)
    assert re.search(r"^  online +Samples and learns$", text, re.MULTILINE)
    for name in ("plugins", "doctor", "new-plugin", "chat"):
        assert re.search(rf"^  {name} +[A-Z]", text, re.MULTILINE), f"{name} is described"
    for flag in ("--model", "--output", "--steps", "--seed", "--resume", "--config"):
        assert re.search(rf"^  {flag}\b", text, re.MULTILINE)


def test_help_of_an_algorithm_shows_exactly_its_options_with_docs_and_defaults(say: Callable[..., str]) -> None:
    text = " ".join(say("online", "--help").split())
    assert "Samples and learns. As the paper says." in text
    assert re.search(r"--data table [\w, ]*\bjson, memory, prompts\b[\w, ]*\btable --", text), "the choices of a kind"
    assert "--data.path STR where the rows are (required)" in text
    assert "--reward.limit INT characters at which the reward reaches zero (default: 400)" in text
    assert "--algorithm.clip FLOAT where the ratio is cut (default: 0.2)" in text
    assert "--actor.optim.lr FLOAT peak learning rate (default: 3e-05)" in text
    assert "--sampling.n INT completions per prompt (default: 6)" in text, "the algorithm's own default"
    assert "--reference.optim" not in text, "a frozen role has no optimizer"
    assert "--sampling.seed" not in text, "the loop sets it"
    assert "--loss " not in text, "the algorithm has no loss to choose"


def test_help_follows_the_providers_that_are_chosen(say: Callable[..., str]) -> None:
    text = say("online", "--reward", "length", "--help")
    assert "--reward.target INT" in text
    assert "--reward.limit" not in text


def test_help_begins_with_the_ten_flags_that_a_first_run_sets_and_shows_each_once(say: Callable[..., str]) -> None:
    pytest.importorskip("rlhf_algos")
    for words in (["sft", "--data", "hf"], ["grpo", "--reward", "func"], ["dpo"], ["reward"]):
        text = say("-p", "algos", *words, "--help-all")
        first = text.partition("\nmain options\n")[2].partition("\n\n")[0]
        flags = re.findall(r"^  (--\S+)", first, re.MULTILINE)
        assert len(flags) == 10 and {"--model", "--batch-size"} < set(flags)
        assert any(flag.endswith(".optim.lr") for flag in flags)
        everything = re.findall(r"^  (--[a-z]\S*) (?!NAME)", text.partition("main options")[2], re.MULTILINE)
        options = [flag for flag in everything if "." in flag]
        assert len(options) == len(set(options)) > 30


def test_help_names_every_flag_that_help_all_explains(say: Callable[..., str]) -> None:
    brief, whole = say("online", "--help"), say("online", "--help-all")
    explained = {text: set(re.findall(r"^  (--[a-z]\S*)", text, re.MULTILINE)) for text in (brief, whole)}
    named = set(re.findall(r"(?<![\w`])--[a-z][\w.-]*", "".join(brief.split("explained by --help-all:")[1:])))
    assert explained[whole] > {"--seed", "--micro-tokens", "--actor.optim.warmup", "--reward.limit"}
    assert explained[whole] <= explained[brief] | named
    assert {"--seed", "--micro-tokens", "--actor.optim.warmup"} <= named - explained[brief]
    assert len(brief.splitlines()) < 0.6 * len(whole.splitlines())


def test_help_explains_what_is_set_and_the_options_of_a_chosen_optimizer(say: Callable[..., str]) -> None:
    text = say("online", "--help", "--micro-tokens", "7", "--actor.optim.use", "adamw")
    assert re.search(r"^  --micro-tokens INT +token budget", text, re.MULTILINE) and "(set: 7)" in text
    assert re.search(r"^  --actor.optim.betas FLOAT FLOAT", text, re.MULTILINE)
    assert not re.search(r"^  --seed INT", text, re.MULTILINE)


def test_help_shows_what_a_file_sets(say: Callable[..., str]) -> None:
    Path("run.toml").write_text('algorithm = "online"\n[reward]\nlimit = 7\n')
    assert "(set: 7)" in say("--config", "run.toml", "--help")


def test_help_is_as_wide_as_the_terminal(say: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (70, 110):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = [line for line in say("online", "--help").splitlines() if line.startswith(" " * 34)]
        assert columns - 15 < max(map(len, lines)) <= columns


@pytest.mark.parametrize("command", ["plugins", "doctor", "new-plugin", "chat"])
def test_a_command_documents_itself(command: str, say: Callable[..., str]) -> None:
    assert say(command, "--help").startswith(f"usage: rlhf-run {command}")


# ----------------------------------------------------------------------------------------------------------------------
# plugins, doctor
# ----------------------------------------------------------------------------------------------------------------------


def test_plugins_lists_kind_name_origin_and_description_in_one_line_each(say: Callable[..., str]) -> None:
    text = say("plugins")
    assert re.search(r"^reward +brevity +\(local\) +Short is good\. Shorter is better$", text, re.MULTILINE)
    assert re.search(r"^reward +length +rlhf-core \S+ +\S", text, re.MULTILINE)
    watching = (
        r"^observer +cli_fakes +\(local\) +Providers to try the command line with \(always loaded; -p no:cli_fakes "
    )
    assert re.search(watching, text, re.MULTILINE)


def test_plugins_of_one_kind(say: Callable[..., str]) -> None:
    lines = say("plugins", "--kind", "reward").splitlines()
    assert [line.split()[:2] for line in lines] == [["reward", n] for n in sorted({"brevity", *core.rlhf_reward()})]


def test_plugins_as_json_with_conflicts_and_broken_ones(say: Callable[..., str]) -> None:
    Path("cli_twin.py").write_text(PLUGIN)
    listing = json.loads(say("-p", "cli_twin", "plugins", "--json"))
    assert {
        "kind": "data",
        "name": "table",
        "distribution": "(local)",
        "version": "",
        "description": "Rows of nothing",
    } in (listing["providers"])
    assert {entry["distribution"] for entry in listing["conflicts"][0]} == {"(local)"}
    assert listing["broken"] == []
    assert "conflict: data 'table' is provided by" in say("-p", "cli_twin", "plugins")


def test_a_blocked_plugin_is_not_listed(say: Callable[..., str]) -> None:
    assert "observer  files" in say("plugins", "--kind", "observer")
    assert "observer  files" not in say("-p", "no:files", "plugins", "--kind", "observer")


def test_doctor_shows_versions_devices_plugins_and_what_is_missing(say: Callable[..., str]) -> None:
    import torch

    text = say("doctor")
    assert f"  torch {torch.__version__}" in text
    assert re.search(r"^  cpu: \d+ cores", text, re.MULTILINE)
    assert "  cli_fakes: (local)" in text


def test_doctor_says_first_whether_the_readme_works_and_sorts_the_rest_by_purpose(
    say: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import rlhf_core.cli.doctor as module

    present = dict.fromkeys((*module.README, "rlhf-core"), "1.0")
    monkeypatch.setattr(module, "_version", lambda name: present.get(name, ""))
    assert say("doctor").startswith("README\n  everything in it works here\nversions\n")
    del present["vaderSentiment"]
    text = say("doctor")
    assert text.startswith("README\n  the demo needs vaderSentiment: python3 -m pip install 'rlhf-core[sentiment]'\n")
    models, rewards, tracking, gpus, engines = (
        text.index(f"not installed, for {each}") for each in (*module.PURPOSES, module.ENGINES)
    )
    assert (
        models < text.index("rlhf-core[lora] (needs") < rewards < text.index("rlhf-core[sentiment] (needs") < tracking
    )
    assert tracking < text.index("rlhf-core[wandb] (needs") < gpus < text.index("rlhf-core[flash] (needs") < engines
    assert engines < text.index("strategy deepspeed: python3")


def test_every_extra_of_core_has_a_purpose_and_all_is_the_sum_of_what_every_machine_can_install() -> None:
    from rlhf_core.cli.doctor import PURPOSES

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"]) - {"all"}
    assert {each for names in PURPOSES.values() for each in names} == extras
    (whole,) = project["optional-dependencies"]["all"]
    built_on_gpus = {"flash", "kernels"}
    assert set(re.findall(r"[a-z]+", whole.partition("[")[2])) == extras - built_on_gpus


def test_doctor_says_the_pip_command_of_what_is_missing(
    say: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_core.cli.doctor.INSTALL", {"rollout": {"warp": "rlhf-rollout-warp"}})
    requires = ['gguf>=0.17; extra == "gguf"', "numpy", 'no-such-dist>=1; extra == "more" and python_version > "3"']
    monkeypatch.setattr("rlhf_core.cli.doctor.metadata.requires", lambda name: requires)
    text = say("doctor")
    assert "rollout warp: python3 -m pip install rlhf-rollout-warp" in text
    assert "rlhf-core[more] (needs no-such-dist): python3 -m pip install 'rlhf-core[more]'" in text


# ----------------------------------------------------------------------------------------------------------------------
# what is imported
# ----------------------------------------------------------------------------------------------------------------------

LIGHT = [
    "--help",
    "--version",
    "plugins",
    "plugins --json",
    "-p cli_fakes online --help",
    "-p cli_fakes online --reward.limt 3",
    "-p cli_fakes online --reward nonsense",
    "-p cli_fakes online --steps many",
    "nonsense",
    "new-plugin light",
    "--config missing.toml",
]


@pytest.mark.parametrize("autoload", ["0", "1"])
def test_help_listings_and_mistakes_import_no_torch(autoload: str) -> None:
    code = f"""
import contextlib, io, sys
from rlhf_core import plugin as core
from rlhf_core.cli import main
for line in {LIGHT!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(line.split()) in (0, 2), line
    heavy = {{"torch", "transformers", "numpy"}} & set(sys.modules) - {{"numpy"}}
    assert not heavy, (line, heavy)
"""
    environment = {**os.environ, "RLHF_DISABLE_PLUGIN_AUTOLOAD": autoload}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "rlhf_core", "nonsense"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("rlhf-run: no algorithm is called 'nonsense'") and done.stderr.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m rlhf_core plugins | (exec <&-; sleep 0.5); exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
