"""Reward workers: how much of perfect division eight processes reach, with even and with skewed costs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rlhf_core.contract.engines import open_provider
from rlhf_core.reward.func import Func
from rlhf_core.testing.batches import make_batch
from scaling_curves.curve import Measured, Ratio, Series, curve

WORKERS, GROUP = 8, 8

REWARD = '''"""Sleeps as long as a completion says, and reports how long that really took."""
import time

def reward_func(completions):
    seconds = []
    for text in completions:
        began = time.perf_counter()
        time.sleep(float(text))
        seconds.append(time.perf_counter() - began)
    return {"rewards": [0.0] * len(completions), "extra_logs": {"seconds": seconds}}
'''


def costs_of(kind: str, seconds: float, samples: int) -> list[float]:
    """Return the cost of each sample, `seconds` on average; completions of a prompt are adjacent."""
    if kind == "even":
        return [seconds] * samples
    slow = samples // WORKERS if kind == "first eighth" else GROUP  # one hard prompt of all
    share = 0.9975 if kind == "first eighth" else 0.5
    total = seconds * samples
    return [share * total / slow] * slow + [(1 - share) * total / (samples - slow)] * (samples - slow)


def efficiency(path: Path, costs: Sequence[float], repeat: int) -> float:
    """Return the seconds inside of calls, divided by workers and by the wall seconds of all; the best of `repeat`."""
    rollouts = make_batch([1] * len(costs))
    rollouts.texts = [f"{cost:.9f}" for cost in costs]
    best = 0.0
    with open_provider(Func(str(path), workers=WORKERS)) as reward:
        reward(rollouts.rows(range(WORKERS)))  # starts the processes
        for _ in range(repeat):
            began = time.perf_counter()
            output = reward(rollouts)
            wall = time.perf_counter() - began
            best = max(best, float(output.metrics["seconds"].double().sum()) / WORKERS / wall)
    return best


@curve("workers", f"{WORKERS} reward workers: share of perfect division (wall), by the seconds of a sample")
def workers(quick: bool) -> Measured:
    """The cost is sleep, so that eight workers need no eight cores; what it really took is measured inside of the calls."""
    sizes = [(1e-3, 64)] if quick else [(1e-4, 4096), (1e-3, 1024), (1e-2, 512), (1e-1, 128), (1.0, 128)]
    series, ratios = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "slow_reward.py")
        path.write_text(REWARD, encoding="utf-8")
        for kind in ("even", "first eighth", "one prompt"):
            points = [
                (seconds, efficiency(path, costs_of(kind, seconds, samples), 1 if seconds > 0.05 else 5))
                for seconds, samples in sizes
            ]
            series.append(Series(f"cost: {kind}", "seconds a sample", "of perfect division", points))
            ratios.append(Ratio(f"cost: {kind}, least", min(share for _, share in points), 0.8, at_least=True))
            if not quick:  # a call of 13 ms in all, in which every message counts; a busy machine needs more tries
                short = efficiency(path, costs_of(kind, 1e-4, 1024), repeat=40)
                ratios.append(Ratio(f"cost: {kind}, 1,024 samples of 0.1 ms", short, 0.8, at_least=True))
    return Measured(series, ratios)
