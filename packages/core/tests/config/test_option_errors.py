"""Messages name options as their user wrote them: as flags, as keys of a file, or as arguments in Python."""

from __future__ import annotations

import ast
import pickle
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.cli.app import main
from rlhf_core.config.builder import make_config
from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.hooks import KINDS
from rlhf_core.contract.options import Lora, RunConfig, TrainedOptions
from rlhf_core.contract.providers import Reward
from rlhf_core.errors import OptionError, UsageError, advice, option, options_under, run_option, spell_options
from rlhf_core.option_text import OptionNames, render_options
from rlhf_core.reward.remote import Remote
from rlhf_core.reward.sum import Sum
from rlhf_core.run.run import Run

TINY = "rlhf_core.testing.tiny_algorithm:TinyAlgorithm"
FEW = {"model": "tiny:hidden=16,layers=1", "steps": 1, "batch_size": 2, "sampling": {"n": 2, "max_new_tokens": 4}}
ADDRESS = "ftp://x: expected an address such as http://127.0.0.1:5000/get_reward"


@dataclass(frozen=True)
class Late(Reward):
    """A reward that finds out in the first batch that it cannot work."""

    limit: int = 3
    """characters"""

    def __call__(self, rollouts: Rollouts) -> list[float]:
        raise OptionError(
            "limit", f"{self.limit} is below the {len(rollouts)} rows; lower {run_option('batch_size', 1)}"
        )


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The last line of the command line's answer."""
    assert main([TINY, "--model", "tiny:hidden=16,layers=1", "--steps", "1", *words]) == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("rlhf-run: ")


def raised(**options: Any) -> str:
    """The message of a run from Python."""
    with pytest.raises(UsageError) as caught:
        Run(make_config(TINY, **{**FEW, **options})).train()
    return str(caught.value)


def test_an_option_of_a_provider_is_a_flag_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--reward", "remote", "--reward.url", "ftp://x") == f"--reward.url {ADDRESS}"


def test_an_option_of_a_provider_inside_another_is_a_path(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--reward", "sum", "--reward.parts", "length", "remote url=ftp://x"]
    assert said(capsys, *words) == f"reward.parts[1].url {ADDRESS}"
    assert said(capsys, *words[:3], "length targt=3").startswith(
        "reward.parts[0] 'length targt=3': length has no option"
    )


def test_an_option_from_a_file_is_a_key_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text('[reward]\nuse = "remote"\nurl = ["ftp://x"]\n[actor.lora]\ndropout = 2.0\n')
    file = ["--config", "run.toml"]
    assert said(capsys, *file) == "actor.lora.dropout in run.toml must be below 1, not 2.0"
    assert said(capsys, *file, "--actor.lora.dropout", "0") == f"reward.url in run.toml {ADDRESS}"
    words = [*file, "--actor.lora.dropout", "0", "--reward.url", "ftp://y"]
    assert said(capsys, *words).startswith("--reward.url ftp://y: ")


def test_an_option_is_an_argument_in_python() -> None:
    assert raised(reward=Remote(url=("ftp://x",))) == f"Remote(url=…) {ADDRESS}"
    assert raised(reward={"use": "remote", "url": ["ftp://x"]}) == f"reward.url {ADDRESS}"
    assert raised(reward=Sum(parts=("remote url=ftp://x",))) == f"reward.parts[0].url {ADDRESS}"


def test_an_option_of_the_run_is_a_flag_or_an_argument(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--batch-size", "0") == "--batch-size must be at least 1, not 0"
    assert said(capsys, "--sampling.top-p", "2") == "--sampling.top-p must be at most 1, not 2.0"
    assert raised(batch_size=0) == "batch_size=… must be at least 1, not 0"
    assert raised(sampling={"top_p": 2.0}) == "sampling.top_p must be at most 1, not 2.0"


def test_an_option_of_a_role_is_a_flag_a_path_or_an_argument(capsys: pytest.CaptureFixture[str]) -> None:
    unknown = "nothing: no linear layer of the model has this name"
    words = ["--actor.lora.rank", "2", "--actor.lora.targets", "nothing", "--reward", "length"]
    assert said(capsys, *words).startswith(f"--actor.lora.targets {unknown}")
    lora = Lora(rank=2, targets=("nothing",))
    assert raised(actor={"lora": {"rank": 2, "targets": ["nothing"]}}).startswith(f"actor.lora.targets {unknown}")
    assert raised(actor=TrainedOptions(lora=lora)).startswith(f"TrainedOptions(lora=Lora(targets=…)) {unknown}")


def test_an_error_of_the_first_batch_names_the_option_too(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--reward", "test_option_errors:Late", "--reward.limit", "1", "--batch-size", "2", "--sampling.n", "2"]
    words += ["--sampling.max-new-tokens", "4"]
    assert said(capsys, *words) == "--reward.limit 1 is below the 4 rows; lower --batch-size 1"
    assert raised(reward=Late(2)) == "Late(limit=…) 2 is below the 4 rows; lower batch_size=1"


def test_a_bare_error_names_its_field_and_survives_a_process() -> None:
    assert str(OptionError("timeout", "must be above 0")) == "timeout must be above 0"
    with pytest.raises(OptionError) as caught, options_under("parts[2]"):
        raise OptionError("timeout", "must be above 0")
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is OptionError
    with pytest.raises(OptionError) as outer, spell_options(OptionNames(language="flags")), options_under("/reward"):
        raise again
    assert str(outer.value) == "reward.parts[2].timeout must be above 0"


def test_several_options_share_an_error() -> None:
    assert str(OptionError(("chosen-key", "rejected_key"), "go together")) == "chosen_key and rejected_key go together"


def test_only_options_that_the_run_has_are_recommended() -> None:
    text = "no label" + advice(f"; pass {run_option('data.label_key')}", "; choose other data")
    having = OptionNames(options=frozenset({"data.label_key"}), language="flags")
    lacking = OptionNames(options=frozenset({"data.path"}), language="flags")
    assert render_options(text, having) == "no label; pass --data.label-key"
    assert render_options(text, lacking) == "no label; choose other data"


def test_a_recommended_value_is_written_in_the_users_language() -> None:
    text = f"{option('too_long', 'cut')} {option('limit', 3)} {option('whole', True)}"
    with pytest.raises(UsageError) as caught, options_under("/data"):
        raise UsageError(text)
    raw = caught.value.args[0]
    assert render_options(raw, OptionNames(language="flags")) == "--data.too-long cut --data.limit 3 --data.whole"
    classes = {"data": "Rows"}
    python = render_options(raw, OptionNames(language="python", classes=classes))
    assert python == 'Rows(too_long="cut") Rows(limit=3) Rows(whole=True)'
    toml = render_options(raw, OptionNames(language="flags", file="a.toml", in_file=frozenset({"data"})))
    assert toml == 'data.too_long = "cut" in a.toml data.limit = 3 in a.toml data.whole = true in a.toml'


# ----------------------------------------------------------------------------------------------------------------------
# the source
# ----------------------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[4]
NAMES = {each.name.replace("_", "-") for each in fields(RunConfig)} | set(KINDS)
FLAG = re.compile(rf"(?<![\w-])--([a-z][a-z-]*\.[a-z]|({'|'.join(sorted(NAMES))})(?![\w-]))|(?<![\w-])--$")


def literal_flags(source: str) -> list[str]:
    """The string constants of a module, documentation aside, that hold a flag of a run's option."""
    tree = ast.parse(source)
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [node.value for node in texts if id(node) not in documentation and FLAG.search(node.value)]


def test_a_literal_flag_is_found_and_documentation_is_not() -> None:
    found = literal_flags('"""--reward.url"""\nx = f"pass --{name}.lora"\ny = "lower --batch-size"\nz = "--port"\n')
    assert sorted(found) == ["lower --batch-size", "pass --"]


def test_no_message_outside_the_command_line_holds_a_literal_flag() -> None:
    rooms = {"config", "cli", "recipe", "testing", "translation"}  # what reads flags, and what writes commands
    for path in sorted((ROOT / "packages").glob("*/src/*/**/*.py")):
        if not rooms & set(path.parts) and path.name != "option_text.py":
            assert literal_flags(path.read_text(encoding="utf-8")) == [], path


def test_several_rewards_are_answered_with_the_reward_that_combines_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "--reward takes one value, not 'length regex pattern=a'; to combine several, pass "
    assert said(capsys, "--reward", "length", "regex pattern=a") == (
        f"{told}--reward sum --reward.parts length 'regex pattern=a'"
    )
    (tmp_path / "run.toml").write_text("reward = ['length', 'regex']\n")
    assert said(capsys, "--config", "run.toml") == (
        'run.toml: reward is a list; to combine several, set use = "sum" and parts = [...]'
    )
