"""Providers that draw from the generators of Python, numpy and torch repeat: in a new process, after resuming, in workers."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from drawing import reward_func
from stuck import run

from rlhf_core.testing import run_ranks
from rlhf_core.util.random_states import get_random_states, seed_libraries, set_random_states
from rlhf_core.util.worker_processes import Workers

WORDS = ["rlhf_core.testing.tiny_algorithm:TinyAlgorithm", "--model", "tiny:hidden=16,layers=1", "--batch-size", "2"]
WORDS += ["--sampling.max-new-tokens", "4", "--save-every", "1"]
WORDS += ["--advantage", "drawing:NoisyAdvantage", "--reward", "sum", "--reward.parts", "drawing:Noise"]
WORDS += ["func path=drawing:reward_func workers=2 batch=1"]


def test_what_is_drawn_repeats_in_another_process_and_after_resuming(tmp_path: Path) -> None:
    """A reward in this process, one in two workers, and an advantage, all of them noise."""

    def train(output: str, steps: int, *words: str) -> tuple[bytes, bytes]:
        folder = tmp_path / output
        (done,) = run_ranks(1, run, *WORDS, "--steps", str(steps), "--output", str(folder), *words)
        assert done.code == 0, done.stderr
        return (folder / "samples.jsonl").read_bytes(), (folder / "model" / "model.safetensors").read_bytes()

    whole = train("whole", 2)
    train("parts", 1)
    assert train("parts", 2, "--resume") == whole


def test_a_call_in_a_worker_draws_the_same_whichever_process_it_gets() -> None:
    """One process does all calls, or three share them; the order of a set of texts does not differ either."""
    calls = [("drawing:reward_func", "", {"queries": ["x"], "completions": ["x"]})] * 6
    answers = []
    for count in (1, 3):
        workers = Workers(count, "rlhf_core.reward.calls:call", ("drawing:reward_func", ""))
        answers.append([answer.rewards for answer in workers.map(calls, timeout=0, seed=7)])
        workers.close()
    assert answers[0] == answers[1]
    assert len({rewards[0] for rewards in answers[0]}) == 6, "each call has a seed of its own"


def test_states_continue_every_library_and_seeds_repeat_them() -> None:
    before = get_random_states()
    try:
        draws = []
        for _ in range(2):
            seed_libraries(2**40 + 3)
            draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        assert draws[0] == draws[1]
        states = get_random_states()
        first = reward_func(["x"])
        set_random_states(states)
        assert reward_func(["x"]) == first
    finally:
        set_random_states(before)
