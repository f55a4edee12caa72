"""Collectives of a step: how many calls, and how many bytes a rank pickles, at growing numbers of ranks.

Calls that carry gradients or rows are counted apart. Each optimizer step has one per bucket of gradients, whatever core does.
Rows move between ranks, in two calls, only if that makes their tokens more even.
"""

from __future__ import annotations

import json
import pickle
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlhf_core import Run, make_config
from rlhf_core.testing import run_ranks
from scaling_curves.curve import Measured, Ratio, Series, curve

CALLS = ("all_reduce", "all_gather_object")
ROWS = "all_to_all_single"
CHOSEN: dict[str, dict[str, Any]] = {"grpo": {"minibatches": 1}, "dapo": {"minibatches": 1}, "ppo": {}}
"""Options by algorithm; PPO keeps its defaults: 4 minibatches for each of two roles."""


def count(folder: str, algorithm: str) -> None:
    """Train three steps on a rank; write the number of calls of each collective in the last one, and its pickled bytes."""
    torch.set_num_threads(1)
    calls: Counter[str] = Counter()

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            carries_gradients = any(frame.name == "_sum_gradients" for frame in traceback.extract_stack())
            calls["gradients" if carries_gradients else name] += 1
            if name == "all_gather_object":
                calls["pickled"] += len(pickle.dumps(args[1]))
            return call(*args, **options)

        return counted

    for name in (*CALLS, ROWS):
        setattr(torch.distributed, name, counting(name, getattr(torch.distributed, name)))

    class Counting(Run):
        def finish(self, *args: Any) -> None:
            super().finish(*args)
            calls["rounds"] = int(self.last_metrics.get("dynamic/rounds", 0))
            if self.step == self.config.steps and self.leader:
                Path(folder, "calls.json").write_text(json.dumps(calls), encoding="utf-8")
            calls.clear()

    chosen: dict[str, Any] = {"reward": "length", "sampling": {"n": 4, "max_new_tokens": 8}, **CHOSEN[algorithm]}
    config = make_config(
        algorithm, model="tiny", data="prompts", steps=3, batch_size=8, output=f"{folder}/run", **chosen
    )
    Counting(config).train()


def counted(ranks: int, algorithm: str) -> dict[str, int]:
    """Return the calls of a step on so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        done = run_ranks(ranks, count, folder, algorithm)
        if any(rank.code for rank in done):
            raise SystemExit(done[0].stderr[-3000:])
        found: dict[str, int] = json.loads(Path(folder, "calls.json").read_text(encoding="utf-8"))
    return found


@curve("collectives", "collectives of a step beside those of gradients and rows: GRPO, DAPO's dynamic sampling, PPO")
def collectives(quick: bool) -> Measured:
    """The tiny model under `--strategy torch`; its gradients are one bucket. A round of dynamic sampling has one call."""
    series, ratios = [], []
    for algorithm in ("ppo",) if quick else CHOSEN:
        found = {ranks: counted(ranks, algorithm) for ranks in ((2,) if quick else (2, 4))}
        calls = {ranks: sum(each.get(name, 0) for name in CALLS) for ranks, each in found.items()}
        for what, unit, values in (
            ("calls of a step", "calls", calls),
            ("calls with gradients", "calls", {ranks: each["gradients"] for ranks, each in found.items()}),
            ("calls with rows", "calls", {ranks: each.get(ROWS, 0) for ranks, each in found.items()}),
            ("pickled by a rank", "B", {ranks: each["pickled"] for ranks, each in found.items()}),
        ):
            series.append(Series(f"{algorithm}, {what}", "ranks", unit, list(values.items())))
        last = max(found)
        ratios.append(Ratio(f"{algorithm}, calls of a step beside one a round", calls[last] - found[last]["rounds"], 8))
    return Measured(series, ratios)
