"""Sampling replay in whole runs: under truncation the policy that is trained is the one that sampled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import Run, make_config
from rlhf_core.cli import main
from rlhf_core.contract.batch import Prompts, Rollouts
from rlhf_core.contract.options import Sampling
from rlhf_core.contract.roles import Role
from rlhf_core.rollout.hf import HuggingFaceRollout
from rlhf_core.testing import run_ranks

MODEL = "tiny:hidden=32,layers=1"


def words_of(output: Path, *flags: str) -> list[str]:
    """A GRPO run whose rewards differ within a prompt."""
    reward = output.with_suffix(".py")
    reward.write_text("def reward_func(completions):\n    return [sum(map(ord, text)) % 7 for text in completions]\n")
    words = ["grpo", "--model", MODEL, "--reward", "func", "--reward.path", str(reward)]
    words += ["--output", str(output), "--steps", "2"]
    words += ["--batch-size", "2", "--sampling.n", "4", "--sampling.max-new-tokens", "6", "--actor.optim.lr", "1e-2"]
    return [*words, *flags]


def logged(output: Path) -> list[Mapping[str, float]]:
    """Return the metrics of a run, step by step."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def command(output: Path, *flags: str) -> list[Mapping[str, float]]:
    """The metrics of a GRPO run by the command line."""
    assert main(words_of(output, *flags)) == 0
    return logged(output)


@pytest.mark.parametrize("cut", [["--sampling.top-p", "0.8"], ["--sampling.top-k", "20"]])
def test_the_ratio_of_a_first_step_is_one_and_trainer_and_sampler_agree(
    cut: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, flags in (("live", []), ("computed", ["--minibatches", "2", "--actor.optim.lr", "1e-12"])):
        for step in command(tmp_path / name, *cut, *flags):
            assert step["actor/ratio"] == pytest.approx(1, abs=1e-5)
            assert step["actor/mismatch_max"] < 1e-5
            assert step["rollout/kept_mass"] < 1
    assert "sampling is truncated" not in "".join(capsys.readouterr())


def test_switched_off_the_trainer_takes_whole_distributions_and_says_what_that_biases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = ["--sampling.top-k", "20", "--algorithm.kl.coef", "0"]
    off = command(tmp_path / "off", *cut, "--sampling.replay", "off")
    said = " ".join("".join(capsys.readouterr()).split())
    assert "sampling is truncated by top-k 20, but importance ratios" in said
    assert off[0]["actor/ratio"] == pytest.approx(1, abs=1e-5)
    on = command(tmp_path / "on", *cut)
    assert on[0]["reward/mean"] == off[0]["reward/mean"], "the same samples"
    assert on[0]["grad_norm/actor"] > 0
    assert on[0]["grad_norm/actor"] != pytest.approx(off[0]["grad_norm/actor"], rel=1e-3), "another gradient"


def numbers(steps: list[Mapping[str, float]]) -> list[dict[str, float]]:
    """The metrics of every step, but times and what depends on how rows are cut into batches."""
    apart = ("time/", "speed/", "memory/", "padding")
    return [{name: value for name, value in step.items() if not name.startswith(apart)} for step in steps]


CUT = ["--sampling.top-p", "0.8"]


def test_two_ranks_replay_what_one_replays(tmp_path: Path) -> None:
    """Kept sets stay with their rows, in micro-batches of one row and of ranks, over two optimizer steps per batch."""
    flags = [*CUT, "--micro-tokens", "1", "--minibatches", "2"]
    one = numbers(command(tmp_path / "one", *flags))
    done = run_ranks(2, main, words_of(tmp_path / "two", *flags))
    assert not any(rank.code for rank in done), done[-1].stderr[-3000:]
    for alone, both in zip(one, numbers(logged(tmp_path / "two")), strict=True):
        assert both == pytest.approx(alone, abs=1e-4, rel=1e-4)
        assert both["actor/mismatch_max"] < 1e-5


def test_a_resumed_run_replays_bit_for_bit(tmp_path: Path) -> None:
    whole = command(tmp_path / "whole", *CUT)
    command(tmp_path / "parts", *CUT, "--steps", "1")
    assert numbers(command(tmp_path / "parts", *CUT, "--resume")) == numbers(whole)


def test_a_policy_with_adapters_replays_and_its_reference_reads_whole_distributions(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    first, second = command(tmp_path / "run", *CUT, "--minibatches", "2", "--actor.lora.rank", "4")
    assert max(first["actor/mismatch_max"], second["actor/mismatch_max"]) < 1e-5
    assert abs(first["kl/mean"]) < 1e-6 < second["kl/mean"]
    assert first["grad_norm/actor"] > 0


@dataclass(frozen=True)
class Silent(HuggingFaceRollout):
    """An engine that does not say which tokens it kept, and whose log-probabilities core does not take for the trainer's."""

    exact = False

    def __call__(self, role: Role, prompts: Prompts, sampling: Sampling) -> Rollouts:
        rollouts = super().__call__(role, prompts, sampling)
        del rollouts.extras["sampler_log_mass_NT"]
        return replace(rollouts, kept_sets=[])


@pytest.mark.parametrize("minibatches", [1, 2])
def test_where_the_engine_keeps_silent_the_trainer_cuts_by_the_same_rules(minibatches: int, tmp_path: Path) -> None:
    """Compare with the engine's own sets, under the weights that sampled."""
    found: list[Any] = []
    for rollout in (HuggingFaceRollout(), Silent()):
        run = Run(
            make_config(
                "grpo",
                model=MODEL,
                reward="length",
                rollout=rollout,
                batch_size=2,
                steps=1,
                minibatches=minibatches,
                sampling={"n": 4, "max_new_tokens": 6, "top_p": 0.8},
                output=str(tmp_path / f"run-{len(found)}"),
            )
        )
        run.train()
        found.append(run.last_metrics)
    for name in ("loss/actor", "grad_norm/actor", "actor/ratio", "kl/mean", "actor/mismatch"):
        assert found[0][name] == pytest.approx(found[1][name], abs=2e-6, rel=1e-4), name


def test_another_role_that_learns_from_the_samples_reads_whole_distributions(tmp_path: Path) -> None:
    """RePULSe weighs the proposal's samples: log p of the policy over the whole vocabulary, log q over what was kept."""
    run = Run(
        make_config(
            "repulse",
            model=MODEL,
            reward="length",
            batch_size=2,
            steps=1,
            sampling={"n": 4, "max_new_tokens": 6, "top_k": 20},
            output=str(tmp_path / "run"),
        )
    )
    seen: dict[str, Any] = {}

    class Recorder:
        from rlhf_core import hookimpl

        @hookimpl
        def rlhf_before_update(self, run: Any, role: str) -> None:
            for name in ("actor", "proposal") if not seen else ():
                batch = seen.setdefault("batch", self.batches["proposal"])
                seen[name] = run.roles[name].infer(replace(batch, kept_sets=[]), frozenset({"logprobs_NT"}))[
                    "logprobs_NT"
                ]

        @hookimpl
        def rlhf_rollouts_ready(self, run: Any, source: str, rollouts: Any, rewards: Any) -> None:
            self.batches = getattr(self, "batches", {}) | {source: rollouts}

    run.registry.register(Recorder(), "recorder")
    run.train()
    batch = run.samples["proposal"]
    assert (batch["actor.logprobs_NT"] - seen["actor"])[batch.mask_NT].abs().max() < 1e-5
    assert (batch["old_logprobs_NT"] - batch["sampler_logprobs_NT"])[batch.mask_NT].abs().max() < 1e-5
    assert (batch["old_logprobs_NT"] - seen["proposal"])[batch.mask_NT].min() > 0.1, "what was cut off"
