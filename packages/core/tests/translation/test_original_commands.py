"""All commands of the five original documents translate, can start with stub files, and lose no flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from old_commands import ROOT, is_possible, line_of, original_commands, pretend_engines, write_stubs

from rlhf_core.analysis.sweep import read_sweep
from rlhf_core.cli import main
from rlhf_core.config.builder import from_names, parse, to_names
from rlhf_core.plugins.registry import Registry, as_default
from rlhf_core.translation.translate import Translation, translate

pytest.importorskip("rlhf_algos")
COMMANDS = list(original_commands())
REPULSE = [line for program, flags, line in COMMANDS if program == "openrlhf.cli.train_ppo"]

SAME = {
    "actor_learning_rate": ("0",),
    "actor_loss_type": ("ppo", "ctl"),
    "advantage_estimator": ("gae",),
    "alpha": ("0",),
    "atk_success_criteria": ("reward",),
    "beta": ("0.1",),
    "critic_learning_rate": ("0",),
    "damping": ("0.8",),
    "damping_growth_rate": ("100",),
    "damping_strategy": ("linear",),
    "eval_steps": ("-1",),
    "generate_max_len": ("1024",),
    "harmlessness_training_loss_type": ("reinforce",),
    "init_kl_coef": ("0.01",),
    "learning_rate": ("9e-6",),
    "loss_type": ("sigmoid",),
    "lr_scheduler_type": ("cosine",),
    "max_epochs": ("1",),
    "max_len": ("2048",),
    "n_samples_per_prompt": ("1", "4"),
    "num_cg_steps": ("3",),
    "num_episodes": ("1",),
    "reinforce_baseline_type": ("expectation",),
    "rollout_batch_size": ("1024",),
    "sampling_iters": ("1",),
    "save_steps": ("-1",),
    "save_steps_harmless": ("-1",),
    "target_dist_beta": ("0",),
    "train_batch_size": ("128", "250", "80"),
    "zero_stage": ("2",),
}
"""Values that are those of a command without the flag: the old program's defaults, and those that switch something off."""

TOGETHER = {
    "ckpt_path": "the same folder as --save_path",
    "save_path": "the same folder as --ckpt_path",
    "heldout_input_key": "the same column as --input_key",
    **dict.fromkeys(
        (f"{role}_{size}" for role in ("critic", "ref", "reward") for size in ("num_nodes", "num_gpus_per_node")),
        "the same workers as the actor, or none of its own",
    ),
}
"""Flags that change nothing where another one agrees."""


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry()


def translated(line: str, registry: Registry) -> Translation:
    if not is_possible(line, registry):
        pytest.skip("a package that this command needs is not here")
    with as_default(registry):
        return translate(line, registry)


def test_the_documents_have_66_commands() -> None:
    assert len(COMMANDS) == 66


@pytest.mark.parametrize("number", range(66))
def test_every_command_translates_and_can_start(
    number: int, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    translation = translated(COMMANDS[number][2], registry)
    pretend_engines(monkeypatch)
    write_stubs(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    if translation.words[0] == "cat":
        assert translation.words[-2] == ">" and len(translation.words) == 7
        return
    code = main([*translation.words, "--dry-run"])
    assert code == 0, capsys.readouterr().err
    assert translation.problem(registry) == ""


def test_no_flag_is_lost(registry: Registry) -> None:
    """A flag is named in a note, or changes the new command, or has the value that the command has without it."""
    seen: set[tuple[str, str, str]] = set()
    for program, flags, line in COMMANDS:
        if not is_possible(line, registry):
            continue
        full = translated(line, registry)
        head = line.partition(" --" + next(iter(flags), "none"))[0]
        for name, value in flags.items():
            key = (program, name, str(value))
            if key in seen or name in TOGETHER or str(value) in SAME.get(name, ()):
                continue
            seen.add(key)
            without = translated(line_of(head, {each: flags[each] for each in flags if each != name}), registry)
            assert full.words != without.words or any(note.flag == name for note in full.notes), (program, name, value)


SWEEPS = ("toy", "toy-kl", "setting1", "setting2")
OPTIONS = {
    "model", "batch_size", "minibatches", "sampling.n", "sampling.max_new_tokens", "algorithm.kl.coef", "algorithm.alpha",
    "algorithm.target.beta", "algorithm.proposal", "algorithm.compat", "advantage.alpha", "advantage.beta", "loss.aggregate",
    "actor.optim.lr", "actor.optim.betas", "proposal.optim.lr", "proposal.optim.betas", "critic.optim.lr", "critic.optim.betas",
    "algorithm.value.aggregate", "reward.model", "reward.dtype", "algorithm.use", "advantage.use", "loss.use", "evaluator.n",
    "evaluator.kl_coef", "actor.optim.schedule", "actor.optim.warmup", "save_every", "data.heldout_path",
}  # fmt: skip
ROWS = {"toy": None, "toy-kl": None, "setting1": 20_000, "setting2": 20_000}
"""Rows of a sweep's data, where its commands count passes over them."""


def flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Return the values of nested tables by dotted path."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{above}{name}"
        values |= flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return values


def test_commands_of_repulse_become_the_recipes_of_its_tables(registry: Registry) -> None:
    """The recipes were written from the paper's tables, and a test compares them: neither knows of the translator."""
    members = []
    with as_default(registry):
        for name in SWEEPS:
            found = read_sweep(ROOT / "recipes" / "repulse" / f"{name}-sweep.toml").members
            members += [(name, member) for member in {each.method: each for each in found}.values()]
    assert len(members) == len(REPULSE) == 31
    for (name, member), line in zip(members, REPULSE, strict=True):
        wanted = flat(to_names(from_names(member.settings, registry)))
        translation = translated(line, registry)
        words = list(translation.words)
        got = flat(to_names(parse(words, registry)))
        differing = {
            path: (got.get(path), wanted[path]) for path in OPTIONS & set(wanted) if got.get(path) != wanted[path]
        }
        if name.startswith("toy"):
            differing.pop("save_every", None)
        assert not differing, (name, member.method, differing)
        rows = ROWS[name]
        steps = got["steps"] if rows is None else got["epochs"] * rows / got["batch_size"]
        assert steps == wanted["steps"], (name, member.method)
