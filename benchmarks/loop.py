"""One iteration of the loop against the sum of its bare parts: sampling, forwards, backwards and updates in plain code.

The bare parts do the same work in the same process with `transformers` and torch alone: `generate` for the same prompts,
forward passes for the reference (and the critic), loss from full logits, backward, clipping, AdamW. Both sides take turns and
the medians are compared; peak memory is taken in processes of their own. Target on the 135M model: a ratio of at most 1.05.

    python benchmarks/loop.py --model tiny --algorithm grpo
    python benchmarks/loop.py --model smollm2-135m --algorithm ppo
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rlhf_core import Registry, Run, make_config
from rlhf_core.contract.options import ModelOptions
from rlhf_core.models.loading.load import load_model, load_scorer
from rlhf_core.models.loading.tokenizer import load_tokenizer

PROMPTS, SAMPLES, TOKENS = 8, 4, 32


def main() -> None:
    """Time both sides in one process, measure memory in two more, print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--algorithm", default="grpo", choices=["grpo", "ppo"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["ours", "bare"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        sides = [side for side in both(options) if side.__name__ == options.only]
        for _ in range(2):
            sides[0]()
        print(peak_mib())
        return
    memory = {side: float(_child(options, side)) for side in ("ours", "bare")}  # first: both sides together are large
    ours, bare = both(options)
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    for k in range(options.rounds + 1):
        for side in (ours, bare) if k % 2 else (bare, ours):
            seconds = side()
            if k:  # the first round warms up
                times[side.__name__].append(seconds)
    ratio = median(a / b for a, b in zip(times["ours"], times["bare"], strict=True))
    print(
        f"{options.algorithm} {options.model}: loop {median(times['ours']):.2f} s, bare parts {median(times['bare']):.2f} s, "
        f"ratio {ratio:.3f} (median of {options.rounds} pairs); "
        f"peak memory {memory['ours']:.0f} MiB and {memory['bare']:.0f} MiB"
    )


def peak_mib() -> float:
    """Peak resident memory of this process. Linux's VmHWM, since getrusage's maximum is inherited from the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def _child(options: argparse.Namespace, side: str) -> str:
    words = [sys.executable, __file__, "--model", options.model, "--algorithm", options.algorithm, "--only", side]
    return subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ).stdout.split()[-1]


def both(options: argparse.Namespace) -> Iterator[Any]:
    """The two sides as functions that do one iteration and return its seconds; each is set up when first asked for."""
    loop = Loop(options)

    def ours() -> float:
        return loop.step()

    parts = Bare(options)

    def bare() -> float:
        return parts.step()

    return iter((ours, bare))


class Loop:
    """A run that is advanced one step at a time."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.steps: Iterator[float] | None = None

    def step(self) -> float:
        """One iteration; the set-up is not counted."""
        if self.steps is None:
            self.steps = self._steps()
        return next(self.steps)

    def _steps(self) -> Iterator[float]:
        from rlhf_core.loop import collect, credit, update

        registry = Registry()
        config = make_config(
            self.options.algorithm, registry, model=self.options.model, data="prompts", reward="length", steps=100,
            batch_size=PROMPTS, update_epochs=1, minibatches=1, micro_tokens=100_000,
            sampling={"n": SAMPLES, "max_new_tokens": TOKENS}, output=tempfile.mkdtemp(),
        )  # fmt: skip
        run = Run(config, registry)
        with run.open():
            for iteration in run.iterations(collect):
                credited = credit(run, iteration)
                update(run, iteration, credited)
                seconds = time.perf_counter() - iteration.started
                run.finish(iteration, credited)
                yield seconds


@dataclass
class Bare:
    """The parts, written out."""

    options: argparse.Namespace

    def __post_init__(self) -> None:
        self.ready = False

    def _set_up(self) -> None:
        from rlhf_core.data.prompts import ShippedPrompts

        name, model = self.options.model, ModelOptions()
        self.tokenizer = load_tokenizer(name, model)
        self.tokenizer.padding_side = "left"
        self.actor = load_model(name, model, trained=True).requires_grad_(True)
        self.reference = load_model(name, model, trained=False).requires_grad_(False)
        self.models = [self.actor]
        if self.options.algorithm == "ppo":
            self.critic, _ = load_scorer(name, model, trained=True)
            self.models.append(self.critic.requires_grad_(True))
        self.optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-6, fused=True) for m in self.models]
        rows = list(ShippedPrompts()("train"))[:PROMPTS]
        chats = [[{"role": "user", "content": str(row.prompt)}] for row in rows]
        self.prompts = [
            self.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats
        ]
        self.ready = True

    def step(self) -> float:
        """Sample, score, train; plain code on a padded batch."""
        if not self.ready:
            self._set_up()
        started = time.perf_counter()
        inputs = self.tokenizer(self.prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            ids = self.actor.generate(
                **inputs, do_sample=True, top_k=0, max_new_tokens=TOKENS, min_new_tokens=TOKENS,
                num_return_sequences=SAMPLES, pad_token_id=self.tokenizer.pad_token_id,
            )  # fmt: skip
        ids = ids.clone()
        mask = torch.cat(
            [inputs["attention_mask"].repeat_interleave(SAMPLES, 0), torch.ones(len(ids), TOKENS, dtype=torch.long)], 1
        )
        rewards = torch.randn(len(ids))
        with torch.no_grad():
            self._logprobs(self.reference, ids, mask)
            old_values = self._values(ids, mask) if self.options.algorithm == "ppo" else None
        advantages = (rewards - rewards.mean())[:, None]
        logprobs = self._logprobs(self.actor, ids, mask)
        (-(logprobs - logprobs.detach()).exp() * advantages).mean().backward()
        if old_values is not None:
            (self._values(ids, mask) - old_values - advantages).square().mean().backward()
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    def _logprobs(self, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=TOKENS + 1).logits[:, :-1]
        return logits.float().log_softmax(-1).gather(2, ids[:, -TOKENS:, None]).squeeze(2)

    def _values(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self.critic.base_model(input_ids=ids, attention_mask=mask)[0][:, -TOKENS - 1 : -1]
        return self.critic.score(states).squeeze(2)


if __name__ == "__main__":
    main()
