"""A whole run with vLLM in place of transformers' sampling: one option changes, the loop does not."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core import loop
from rlhf_core.contract.options import Sampling
from rlhf_core.rollout.hf import HuggingFaceRollout
from rlhf_core.testing import tiny_run
from rlhf_core.testing.tiny_environment import TinyEnvironment
from rlhf_rollout_vllm.engine import VLLM

pytestmark = pytest.mark.vllm

GREEDY = Sampling(n=1, max_new_tokens=12, temperature=0.0)


def test_after_training_steps_both_engines_sample_the_trained_model(tmp_path: Path) -> None:
    fast = {"optim": {"lr": 0.02}}
    run = tiny_run(tmp_path / "run", rollout=VLLM(kv_cache_gib=0.25, max_num_seqs=16), steps=3, actor=fast)
    with run.open():
        before = {name: tensor.clone() for name, tensor in run.roles["actor"].weights()}
        loop.train(run)
        role: Any = run.roles["actor"]
        assert any((tensor - before[name]).abs().max() > 0.01 for name, tensor in role.weights()), (
            "it learned something"
        )
        prompts = run.encoder.prompts(*next(run.stream))
        ours, theirs = run.rollouts("actor", prompts, GREEDY), HuggingFaceRollout()(role, prompts, GREEDY)
        assert ours.tokens_NT.tolist() == theirs.tokens_NT.tolist()
        torch.testing.assert_close(ours["sampler_logprobs_NT"], theirs["sampler_logprobs_NT"], rtol=0, atol=1e-3)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["sync/calls"] for row in rows] == [4, 4, 4]
    assert 0 <= rows[0]["sync/logprob_diff_mean"] <= rows[0]["sync/logprob_diff_max"] < 1e-3
    assert "sync/logprob_diff_max" not in rows[1], "only the first update is compared"


def test_episodes_are_sampled_turn_by_turn_within_their_limits(tmp_path: Path) -> None:
    """The trainer, which reads an episode once, computes the log-probabilities that vLLM sampled with, turn by turn."""
    run = tiny_run(
        tmp_path / "run",
        rollout=VLLM(kv_cache_gib=0.25, max_num_seqs=16),
        environment=TinyEnvironment(),
        sampling={"n": 4, "max_new_tokens": 20},
        episode={"turn_tokens": 4},
    )
    with run.open():
        prompts = run.encoder.prompts(*next(run.stream))
        played = run.rollouts("actor", prompts, replace(run.config.sampling, seed=3))
        logprobs_NT = run.roles["actor"].infer(played, frozenset({"logprobs_NT"}))["logprobs_NT"]
    mask_NT = played.mask_NT
    torch.testing.assert_close(played["sampler_logprobs_NT"][mask_NT], logprobs_NT[mask_NT], atol=1e-3, rtol=0)
    assert int(played["turns_N"].max()) > 1
    assert int(played.lengths_N.max()) <= 20
    for turn in range(int(played["turns_N"].max())):
        assert int((mask_NT & (played["turns_NT"] == turn)).sum(1).max()) <= 4


@pytest.mark.parametrize("cut", [{"top_p": 0.8}, {"top_k": 20}, {"top_k": 20, "top_p": 0.8}])
def test_under_truncation_the_trainer_has_the_log_probabilities_that_were_sampled_with(
    cut: dict[str, float], tmp_path: Path
) -> None:
    """Over the engine's own kept sets under top-k, and else over those of the same rules on the trainer's logits."""
    vllm = VLLM(kv_cache_gib=0.25, max_num_seqs=16)
    sampling = {"n": 4, "max_new_tokens": 8, **cut}
    tiny_run(tmp_path, rollout=vllm, sampling=sampling, steps=2, actor={"optim": {"lr": 0.01}}).train()
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        step = json.loads(line)
        assert step["rollout/kept_mass"] < 1
        assert step["actor/mismatch_max"] < 1e-3
        assert step["actor/mismatch"] > 0


def test_nothing_of_the_engine_is_left_behind() -> None:
    """In a process of its own, where no other engine is open."""
    script = (
        "import sys, torch, rlhf_rollout_vllm.engine as e; from rlhf_core.testing import tiny_run\n"
        "run = tiny_run(sys.argv[1], rollout=e.VLLM(kv_cache_gib=0.25, max_num_seqs=8), steps=1)\n"
        "hook = sys.excepthook\n"
        "run.train()\n"
        "assert not torch.distributed.is_initialized()\n"
        "assert sys.excepthook is hook\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(find_spec("rlhf_algos") is None, reason="rlhf-algos is not installed")
@pytest.mark.parametrize(
    "launch",
    [
        pytest.param(["-m", "rlhf_core"], marks=pytest.mark.slow, id="one"),
        pytest.param(
            ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "rlhf_core"],
            marks=pytest.mark.engines,
            id="two",
        ),
    ],
)
def test_the_command_line_runs_it_in_one_process_and_in_two(tmp_path: Path, launch: list[str]) -> None:
    options = {
        "model": "tiny",
        "rollout": "vllm",
        "rollout.kv-cache-gib": "0.25",
        "reward": "length",
        "steps": "2",
        "batch-size": "4",
        "sampling.n": "2",
        "sampling.max-new-tokens": "8",
        "output": str(tmp_path / "run"),
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    command = [sys.executable, *launch, "grpo", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert rows[0]["sync/logprob_diff_max"] < 1e-3


@pytest.mark.slow
@pytest.mark.skipif(find_spec("rlhf_algos") is None, reason="rlhf-algos is not installed")
def test_processes_of_an_engine_sample_ahead_of_training(tmp_path: Path) -> None:
    """Without Ray: every step but the first is trained on tokens that are one update old, and the correction knows it."""
    options = {
        "model": "tiny",
        "rollout": "vllm",
        "rollout.process": "own",
        "rollout.kv-cache-gib": "0.25",
        "reward": "length",
        "steps": "3",
        "ahead": "1",
        "batch-size": "4",
        "sampling.n": "2",
        "sampling.max-new-tokens": "8",
        "output": str(tmp_path / "run"),
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_core", "grpo", *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["rollout/staleness"] for row in rows] == [0, 1, 1]
    assert [(row["sync/calls"], row["sync/restarts"]) for row in rows] == [(3, 0)] * 3
