"""Every user's mistake is one line on stderr that says what to do, and exit code 2."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from rlhf_core import plugin as core
from rlhf_core.cli import main
from rlhf_core.contract.hooks import KINDS

PLUGIN = '''
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from rlhf_core import KL, Algorithm, Data, Loss, ModelOptions, Reward, Rollout, Secret, TrainedOptions, hookimpl


@dataclass(frozen=True)
class Rows(Data):
    """Rows of nothing."""

    path: str
    """where the rows are"""

    def __call__(self, split):
        return []


@dataclass(frozen=True)
class Brevity(Reward):
    """Short is good."""

    limit: int = 400
    """characters at which the reward reaches zero"""
    unit: Literal["words", "letters"] = "letters"
    """what is counted"""
    shape: tuple[int, int] = (1, 2)
    """two counts"""
    weights: Mapping[str, float] | None = None
    """a number for each name"""
    key: Annotated[int, Secret()] = 0
    """a number nobody may see"""

    def __post_init__(self):
        if self.limit < 1:
            raise ValueError(f"limit must be positive, not {self.limit}")

    def __call__(self, rollouts):
        return [0.0]


@dataclass(frozen=True)
class BareData(Data):
    """Has no options."""

    def __call__(self, split):
        return []


@dataclass(frozen=True)
class BareRollout(Rollout):
    """Has no options."""

    def __call__(self, role, prompts, sampling):
        return None


@dataclass(frozen=True)
class BareLoss(Loss):
    """Has no options."""

    def __call__(self, outputs, batch):
        return None


@dataclass(frozen=True)
class BareReward(Reward):
    """Has no options."""

    def __call__(self, rollouts):
        return [0.0]


@dataclass(frozen=True)
class Online(Algorithm):
    """Samples and learns."""

    kl: KL | None = KL()
    """the leash"""
    defaults: ClassVar[Mapping[str, str]] = {"data": "table", "reward": "brevity", "rollout": "bare"}
    roles: ClassVar[Mapping[str, Any]] = {"actor": TrainedOptions(), "reference": ModelOptions()}

    def __call__(self, choices):
        return ()


@dataclass(frozen=True)
class Offline(Algorithm):
    """Reads and learns."""

    defaults: ClassVar[Mapping[str, str]] = {"data": "", "loss": "bare"}
    roles: ClassVar[Mapping[str, Any]] = {"reward": TrainedOptions()}

    def __call__(self, choices):
        return ()


@hookimpl
def rlhf_data():
    return {"table": Rows, "bare": BareData}


@hookimpl
def rlhf_rollout():
    return {"bare": BareRollout}


@hookimpl
def rlhf_loss():
    return {"bare": BareLoss}


@hookimpl
def rlhf_reward():
    return {"brevity": Brevity, "bare": BareReward, "late": "module_nobody_has:Late"}


@hookimpl
def rlhf_algorithm():
    return {"online": Online, "offline": Offline}
'''

NAMES = ", ".join(sorted({*core.rlhf_reward(), "bare", "brevity", "late"}))
EVALUATORS = ", ".join(sorted(core.rlhf_evaluator()))
LIMIT = "--reward.limit INT (characters at which the reward reaches zero)"

FLAGS = {
    # the first word
    "onlin": "no algorithm is called 'onlin' (did you mean 'online'?); installed: offline, online",
    "plugin": "no algorithm or command is called 'plugin'; did you mean 'plugins'?",
    "train": "no algorithm is called 'train'; installed: offline, online",
    "--steps 3": "name an algorithm first: rlhf-run ALGORITHM …; installed: offline, online",
    "online grpo": "unexpected 'grpo'; write flags such as --steps 20 after the algorithm",
    "nobody:Algorithm": "--algorithm nobody:Algorithm: no module is called 'nobody' in the working folder or the environment",
    # names of providers
    "online --reward brevty": f"no reward is called 'brevty' (did you mean 'brevity'?); installed: {NAMES}",
    "offline --data rows.jsonl": "no data is called 'rows.jsonl'; to read a file, pass --data.path rows.jsonl; "
    f"installed: {', '.join(sorted({*core.rlhf_data(), 'bare', 'table'}))}",
    "online --reward late": "reward 'late' of (local) needs the module 'module_nobody_has', which is not installed",
    "online --reward": "--reward takes one value, but got none",
    "online --data a b": "--data takes one value, not 'a b'",
    "online --reward a b": "--reward takes one value, not 'a b'; to combine several, pass --reward sum --reward.parts a b",
    "online --reward nobody:Reward": "--reward nobody:Reward: no module is called 'nobody' in the working folder "
    "or the environment",
    "online --evaluator heldout,heldot": f"no evaluator is called 'heldot' (did you mean 'heldout'?); "
    f"installed: {EVALUATORS}",
    "online --loss bare": "algorithm 'online' has no loss; it uses data, sampler, rollout, environment, reward, "
    "filter, strategy, launcher, evaluator, observer",
    "online --loss.clip 1": "unknown flag --loss.clip; algorithm 'online' has no loss (it uses data, sampler, "
    "rollout, environment, reward, filter, strategy, launcher, evaluator, observer)",
    "offline": "algorithm 'offline' needs --data NAME; see rlhf-run plugins --kind data",
    # flags
    "online --reward.limt 3": f"unknown flag --reward.limt; did you mean {LIMIT}?",
    "online --reward.limit": "--reward.limit expects INT, but got none",
    "online --reward.zzz 3": "unknown flag --reward.zzz; reward 'brevity' has the options limit, unit, shape, weights, key; "
    "--reward NAME chooses another provider",
    "online --rollout.n 3": "unknown flag --rollout.n; rollout 'bare' has no options",
    "online --algorithm.zzz 3": "unknown flag --algorithm.zzz; algorithm 'online' has the options kl, kl.coef, kl.estimator, "
    "kl.where, kl.unbiased, kl.target, kl.horizon; the first word chooses another algorithm",
    "online --rewrd brevity": "unknown flag --rewrd; did you mean --reward?",
    "online --stepz 3": "unknown flag --stepz; did you mean --steps INT (training steps)?",
    "online --step 3": "unknown flag --step; did you mean --steps INT (training steps)?",
    "online --lr 3": "unknown flag --lr; did you mean --actor.optim.lr FLOAT (peak learning rate)?",
    "online --confg x": "unknown flag --confg; did you mean --config?",
    "online --zzz 3": "unknown flag --zzz; see rlhf-run online --help",
    "online --actor.optim.lrr 3": "unknown flag --actor.optim.lrr; did you mean --actor.optim.lr FLOAT (peak learning rate)?",
    "online --reference.optim.lr 3": "unknown flag --reference.optim.lr; role 'reference' (frozen) has the options "
    "model, dtype, attention, packing, quantize, trust_remote_code",
    "online --sampling.seed 3": "unknown flag --sampling.seed; sampling has the options n, max_new_tokens, temperature, "
    "top_p, top_k, min_p, replay, stop",
    # values
    "online --steps many": "--steps expects INT, not 'many'",
    "online --steps 3 4": "--steps expects INT, not '3 4'",
    "online --steps 1.5": "--steps expects INT, not '1.5'",
    "online --resume maybe": "--resume expects True|False|{auto}, not 'maybe'",
    "online --actor.optim.lr high": "--actor.optim.lr expects FLOAT, not 'high'",
    "online --reward.unit lines": "--reward.unit expects {words,letters}, not 'lines'",
    "online --reward.shape 1": "--reward.shape expects INT INT, not '1'",
    "online --reward.weights a": "--reward.weights expects [NAME=FLOAT ...]|none, not 'a'",
    "online --reward.key hunter2": "--reward.key expects INT",
    "online --data.path x --steps -1": "--steps must be at least 0, not -1",
    "online --data.path x --sampling.top-p 1.5": "--sampling.top-p must be at most 1, not 1.5",
    "online --data.path x --reward.limit 0": "reward 'brevity': limit must be positive, not 0",
    "online --data.path x --actor.optim.lr nan": "--actor.optim.lr must be at least 0, not nan",
    "online": "data 'table' needs --data.path STR (where the rows are)",
    # -p
    "-p": "-p takes a plugin to load, or no:NAME to block one",
    "-p no:core online": "-p no:core: the plugin 'core' cannot be blocked",
    "-p nobody online": "-p nobody: no plugin or module is called 'nobody'",
    # files
    "online --config": "--config takes one value, but got none",
    "online --config missing.toml": "--config missing.toml: No such file or directory",
    "online --config .": "--config .: Is a directory",
    # commands
    "plugins --kind rewards": f"--kind expects {{{','.join(KINDS)},metric}}, not 'rewards'",
    "plugins --data x": "plugins has no data; see rlhf-run plugins --help",
    "eval tiny": "eval needs --evaluator NAME; see rlhf-run plugins --kind evaluator",
    "eval tiny --loss bare": "eval has no loss; it uses evaluator, data, reward, rollout, strategy, launcher",
    "plugins --jsn": "unknown flag --jsn; did you mean --json True|False (print JSON)?",
    "plugins reward": "unexpected 'reward': rlhf-run plugins",
    "new-plugin": "new-plugin needs NAME, name of the provider: lowercase letters, digits and dashes: rlhf-run new-plugin NAME",
    "new-plugin Big": "new-plugin Big: the name must consist of lowercase letters, digits and dashes, such as brevity",
    "new-plugin brevity": "new-plugin brevity: (local) already provides the reward 'brevity'",
    "new-plugin here": "new-plugin rlhf-here: it already exists; name a new folder",
    "chat": "chat needs MODEL, hub name, folder (OUTPUT/model of a run, or a checkpoint), GGUF file, or `tiny`: "
    "rlhf-run chat MODEL",
    "chat tiny --temperature -1": "--temperature must be at least 0, not -1.0",
    "chat tiny --promt hi": "unknown flag --promt; did you mean --prompt STR (prompt to answer once before the command ends)?",
}

FILES = {
    "steps = 3": "name an algorithm first: rlhf-run ALGORITHM …; installed: offline, online",
    "algorithm = 3": "run.toml: algorithm must be a name, or a table with a name as `use`, not 3",
    "algorithm.use = 3": "run.toml: algorithm must be a name, or a table with a name as `use`, not 3",
    'algorithm = "onlin"': "no algorithm is called 'onlin' (did you mean 'online'?); installed: offline, online",
    'algorithm = "online"\nstepz = 3': "run.toml: unknown option 'stepz'; did you mean steps INT (training steps)?",
    'algorithm = "online"\nsteps = "3"': "run.toml: steps must be INT, not '3'",
    'algorithm = "online"\nsteps = true': "run.toml: steps must be INT, not True",
    'algorithm = "online"\nreward.limt = 3': "run.toml: unknown option 'reward.limt'; did you mean "
    f"{LIMIT.removeprefix('--')}?",
    'algorithm = "online"\nactor = 3': "run.toml: actor must be a table of options, not 3",
    'algorithm = "online"\nactor.optim.betas = [1]': "run.toml: actor.optim.betas must be FLOAT FLOAT, not [1]",
    'algorithm = "online"\ncritic.model = "x"': "run.toml: unknown option 'critic'; see rlhf-run online --help",
    'algorithm = "online"\nreward.key = "hunter2"': "run.toml: reward.key must be INT",
    'algorithm = "online"\nreward.key = "***"': "run.toml: reward.key is hidden in this file; give it as --reward.key env:NAME",
    'algorithm = "online"\nloss = "bare"': "algorithm 'online' has no loss; it uses data, sampler, "
    "rollout, environment, reward, filter, strategy, launcher, evaluator, observer",
    'algorithm = "online"\n[reward]\nuse = "rwd"': f"no reward is called 'rwd'; installed: {NAMES}",
}


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder with the plugin module in it; only what is asked for is loaded."""
    (tmp_path / "error_fakes.py").write_text(PLUGIN)
    (tmp_path / "rlhf-here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "error_fakes", raising=False)
    monkeypatch.setenv("RLHF_DISABLE_PLUGIN_AUTOLOAD", "1")


@pytest.mark.parametrize("line", FLAGS)
def test_a_mistake_on_the_command_line_is_one_line_that_helps(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-p", "error_fakes", *line.split()]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"rlhf-run: {FLAGS[line]}\n"
    assert captured.out == ""


@pytest.mark.parametrize("text", FILES)
def test_a_mistake_in_a_file_is_one_line_that_names_it(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.toml").write_text(text)
    assert main(["-p", "error_fakes", "--config", "run.toml"]) == 2
    assert capsys.readouterr().err == f"rlhf-run: {FILES[text]}\n"


def test_a_file_that_is_no_toml_says_where(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.toml").write_text("steps = = 3")
    assert main(["--config", "run.toml"]) == 2
    assert re.fullmatch(r"rlhf-run: run\.toml: not valid TOML: .*line 1, column 9.*\n", capsys.readouterr().err)


def test_there_are_enough_of_them() -> None:
    assert len(FLAGS) + len(FILES) >= 60
