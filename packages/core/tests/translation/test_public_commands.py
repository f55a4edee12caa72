"""Commands and files of TRL, verl and OpenRLHF become runs that can start, with the numbers that they had."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from old_commands import ROOT, is_possible, pretend_engines, public_commands, write_stubs

from rlhf_core.cli import main
from rlhf_core.config.builder import parse, to_names
from rlhf_core.errors import UsageError
from rlhf_core.plugins.registry import Registry, as_default
from rlhf_core.translation.translate import translate

pytest.importorskip("rlhf_algos")
PUBLIC = public_commands()
CASES = [pytest.param(line, id=f"{project}-{k}") for project, lines in PUBLIC.items() for k, line in enumerate(lines)]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry()


@pytest.fixture(autouse=True)
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_engines(monkeypatch)
    write_stubs(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_there_are_ten_of_each() -> None:
    assert len(PUBLIC["TRL"]) >= 10 and len(PUBLIC["verl"]) >= 10 and len(PUBLIC["OpenRLHF"]) >= 3


@pytest.mark.parametrize("line", CASES)
def test_every_one_translates_and_can_start(line: str, registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    if not is_possible(line, registry):
        pytest.skip("a package that this command needs is not here")
    with as_default(registry):
        translation = translate(line, registry)
    assert not translation.blanks and not any("is unknown" in note.text for note in translation.notes)
    assert main([*translation.words, "--dry-run"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "numbers"),
    [
        (  # 2 rows x 4 steps x 4 processes
            (
                "accelerate launch --num_processes 4 dpo.py --model_name_or_path m --dataset_name d "
                "--per_device_train_batch_size 2 --gradient_accumulation_steps 4"
            ),
            {
                "batch_size": 32,
                "epochs": 3.0,
                "loss.beta": 0.1,
                "actor.optim.lr": 1e-6,
                "actor.optim.schedule": "linear",
            },
        ),
        (  # 16 x 4 completions, 8 of a prompt
            (
                "trl grpo --model_name_or_path m --dataset_name d --reward_model_path r --per_device_train_batch_size 16 "
                "--gradient_accumulation_steps 4 --beta 0.02 --max_steps 7 --loss_type grpo"
            ),
            {"batch_size": 8, "sampling.n": 8, "steps": 7, "algorithm.kl.coef": 0.02, "loss.aggregate": "sequence"},
        ),
        ("trl orpo --model_name_or_path m --dataset_name d --beta 0.3", {"loss.lam": 0.3}),
        ("trl dpo --config dpo.yaml --beta 0.1", {"loss.beta": 0.1, "actor.lora.rank": 32, "loss.use": "ipo"}),
        ("trl dpo --config dpo.yaml", {"loss.beta": 0.05, "dtype": "bfloat16", "actor.optim.warmup": 0.1}),
    ],
)
def test_numbers_of_trl(line: str, numbers: dict[str, object], registry: Registry) -> None:
    with as_default(registry):
        got = flat(to_names(parse(list(translate(line, registry).words), registry)))
    assert {path: got[path] for path in numbers} == numbers


def test_batches_of_openrlhf_are_prompts_times_completions(registry: Registry) -> None:
    """1,024 prompts of 4 completions, at 128 completions an optimizer step, are 32 steps of each pass."""
    line = (
        "python -m openrlhf.cli.train_ppo --pretrain m --reward_pretrain r --prompt_data d --rollout_batch_size 1024 "
        "--n_samples_per_prompt 4 --train_batch_size 128 --max_epochs 2 --num_episodes 3"
    )
    if not is_possible(line, registry):
        pytest.skip("DeepSpeed is not here")
    with as_default(registry):
        got = flat(to_names(parse(list(translate(line, registry).words), registry)))
    expected = {"batch_size": 1024, "sampling.n": 4, "minibatches": 32, "update_epochs": 2, "epochs": 3.0}
    assert {path: got[path] for path in expected} == expected


def flat(tree: dict[str, object], above: str = "") -> dict[str, object]:
    """Return the values of nested tables by dotted path."""
    values: dict[str, object] = {}
    for name, value in tree.items():
        values |= flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return values


def test_an_unknown_flag_is_named(registry: Registry) -> None:
    with as_default(registry):
        translation = translate("trl sft --model_name_or_path m --dataset_name d --frobnicate 3", registry)
    assert [note.flag for note in translation.notes] == ["frobnicate"]
    assert "# --frobnicate: this flag is unknown; `rlhf-run sft --help` lists the options" in translation.text()


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("trl sftt --model_name_or_path m", "trl sftt is not a supported program; did you mean 'trl sft'"),
        ("", "give one command that trains, generates or scores; found none"),
        ("trl sft; trl dpo", "found 2 programs: trl sft, trl dpo"),
        ("trl sft --config absent.yaml", "absent.yaml: No such file or directory"),
        ("trl sft --model 'm", "the command cannot be read: no closing quotation"),
        ("trl sft --per_device_train_batch_size $size", "--per_device_train_batch_size $size: this is not a number"),
    ],
)
def test_mistakes_are_one_line(line: str, error: str, registry: Registry) -> None:
    with as_default(registry), pytest.raises(UsageError) as caught:
        translate(line, registry)
    assert error in str(caught.value) and "\n" not in str(caught.value)


OLD = """
size=4
deepspeed --include localhost:0,1 --module openrlhf.cli.train_dpo --pretrain tiny --dataset a.jsonl \\
    --train_batch_size $size --input_template $'Q: {}\\nA:' --enforce_eager   # a comment
    --beta 0.2 &
"""


def test_lines_of_a_shell(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    """Variables, comments, a forgotten backslash, quotes with escapes, and two devices."""
    if not is_possible(OLD, registry):
        pytest.skip("DeepSpeed is not here")
    assert main(["translate", OLD]) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "torchrun --nproc-per-node 2 -m rlhf_core dpo \\\n    --model tiny \\\n    --batch-size 4 \\\n"
    )
    assert (
        "--data.encoding.input-template $'Q: {}\\nA:'" in text and "--loss.beta 0.2" in text and "comment" not in text
    )


def test_a_configuration_is_the_command(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    old = "trl dpo --config dpo.yaml"
    assert main(["translate", old, "--write", "new.toml"]) == 0
    assert capsys.readouterr().out.startswith("rlhf-run --config new.toml\n# --max_prompt_length: ")
    with as_default(registry):
        words = translate(old, registry).words
        assert to_names(parse(["--config", "new.toml"], registry)) == to_names(parse(list(words), registry))
    assert main(["translate", "python annotate_data/get_rewards.py", "--write", "new.toml"]) == 2
    assert "--write writes the configuration of a run" in capsys.readouterr().err
    assert main(["translate", "dpo.yaml"]) == 2
    assert "give the whole command, such as 'trl dpo --config dpo.yaml'" in capsys.readouterr().err


def test_the_pages_are_current() -> None:
    tool = ROOT / "tools" / "coming_from.py"
    done = subprocess.run([sys.executable, str(tool), "--check"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
