"""Collectives of a step: how many calls, and how many bytes a rank pickles, at growing numbers of ranks."""

from __future__ import annotations

import json
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlhf_core import Run, make_config
from rlhf_core.testing import run_ranks
from scaling_curves.curve import Measured, Ratio, Series, curve

CALLS = ("all_reduce", "all_gather_object", "all_to_all_single")


def count(folder: str, algorithm: str) -> None:
    """Train three steps on a rank; write the number of calls of each collective in the last one, and its pickled bytes."""
    torch.set_num_threads(1)
    calls: Counter[str] = Counter()

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            if name == "all_gather_object":
                calls["pickled"] += len(pickle.dumps(args[1]))
            return call(*args, **options)

        return counted

    for name in CALLS:
        setattr(torch.distributed, name, counting(name, getattr(torch.distributed, name)))

    class Counting(Run):
        def finish(self, *args: Any) -> None:
            super().finish(*args)
            calls["rounds"] = int(self.last_metrics.get("dynamic/rounds", 0))
            if self.step == self.config.steps and self.leader:
                Path(folder, "calls.json").write_text(json.dumps(calls), encoding="utf-8")
            calls.clear()

    chosen: dict[str, Any] = {"reward": "length", "sampling": {"n": 4, "max_new_tokens": 8}, "minibatches": 1}
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


@curve("collectives", "collectives of a GRPO step with one update, and of DAPO's dynamic sampling")
def collectives(quick: bool) -> Measured:
    """The tiny model under `--strategy torch`; its gradients are one bucket. A round of dynamic sampling has one call."""
    series, ratios = [], []
    for algorithm in ("grpo",) if quick else ("grpo", "dapo"):
        found = {ranks: counted(ranks, algorithm) for ranks in ((2,) if quick else (2, 4))}
        sizes = list(found) if len(found) > 1 else [*found, *found]
        calls = {ranks: sum(each.get(name, 0) for name in CALLS) for ranks, each in found.items()}
        series.append(Series(f"{algorithm}, calls of a step", "ranks", "calls", [(r, calls[r]) for r in found]))
        series.append(
            Series(f"{algorithm}, pickled by a rank", "ranks", "B", [(r, found[r].get("pickled", 0)) for r in found])
        )
        last = sizes[-1]
        rounds = found[last]["rounds"]
        ratios.append(
            Ratio(f"{algorithm}, calls of a step beside one a round", calls[last] - rounds, 8 + 3 * (rounds > 0))
        )
    return Measured(series, ratios)
