"""Words and colors of all figures: metrics with units, methods by their proper names, one color per method, smoothed lines."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["COLORS", "FEW", "MEASURES", "Measure", "colors_of", "measure_of", "method_name", "smooth", "thin"]

COLORS = ("#2463b4", "#c4581a", "#2e7d4f", "#8a4fa3", "#a8862b", "#23808c", "#b23a57", "#59636b")
"""Colors on a light ground, by number; page.css has them as `--c0` and on, with a twin for a dark one."""

FEW = 32
"""Up to so many points are drawn as they are, each with a mark; more are smoothed."""

MOST = 240
"""Points of a line that a figure holds; more are thinned, since no reader sees them."""


class Measure(NamedTuple):
    """A metric in words."""

    title: str
    """name of what is measured"""
    unit: str
    """unit and, where it helps, of how much"""

    @property
    def label(self) -> str:
        """Title and unit, without saying a word twice: `Reward, held out, per completion`."""
        return f"{self.title}, {self.unit.removeprefix(self.title.partition(',')[0].lower()).strip() or self.unit}"


MEASURES = (
    (r"(?:(\w+)/)?reward/mean", "Reward", "reward per completion"),
    (r"return", "Return: reward less the KL penalty", "reward per completion"),
    (r"kl/mean", "KL divergence from the reference", "nats per token"),
    (r"kl/completion", "KL divergence of a completion", "nats per completion"),
    (r"(?:(\w+)/)?completion/length", "Length of completions", "tokens"),
    (r"(?:(\w+)/)?completion/truncated", "Completions that were cut", "share, 0 to 1"),
    (r"(?:(\w+)/)?completion/entropy", "Entropy of the policy", "nats per token"),
    (r"(?:(\w+)/)accuracy", "Pairs ranked as labeled", "share, 0 to 1"),
    (r"(?:(\w+)/)margin", "Margin of the chosen completion", "reward"),
    (r"loss/(\w+)", "Loss", "loss"),
    (r"grad_norm/(\w+)", "Gradient norm before clipping", "norm"),
    (r"(?:(\w+)/)clip_fraction", "Tokens whose ratio was clipped", "share, 0 to 1"),
    (r"(?:(\w+)/)mismatch", "Difference between sampler and trainer", "nats per token"),
    (r"lr/(\w+)", "Learning rate", "rate"),
    (r"speed/tokens", "Speed", "tokens per second"),
    (r"reward", "Reward", "reward per completion"),
)
"""Metrics of training in the order of a report: pattern (a group names a role), title, and unit."""

EVALUATIONS = (
    (r"heldout/reward", "Reward, held out", "reward per completion"),
    (r"heldout/length", "Length of completions, held out", "tokens"),
    (r"heldout/truncated", "Completions that were cut, held out", "share, 0 to 1"),
    (r"heldout/(?:\w+/)?loss", "Loss, held out", "loss"),
    (r"heldout/(?:\w+/)?perplexity", "Perplexity, held out", "perplexity"),
    (r"bad/logprob", "log P(bad output)", "nats"),
    (r"bad/probability", "P(bad output)", "probability"),
    (r"policy/kl", "KL divergence from the reference, held out", "nats per completion"),
    (r"policy/kl_token", "KL divergence from the reference, held out", "nats per token"),
    (r"preference/accuracy", "Pairs ranked as labeled, held out", "share, 0 to 1"),
    (r"preference/margin", "Margin of the chosen completion, held out", "reward"),
    (r"pass@(\d+)", "pass@{}", "probability"),
    (r"win_rate", "Win rate against the opponent", "share, 0 to 1"),
    (r"gcg/success", "Attacks that succeed", "share, 0 to 1"),
    (r"gcg/loss", "Loss of the best suffix", "nats"),
)
"""Metrics `eval/<name>` in words."""

METHODS = {
    "reinforce": "REINFORCE",
    "repulse": "RePULSe",
    "ppo": "PPO",
    "grpo": "GRPO",
    "rloo": "RLOO",
    "dpo": "DPO",
    "sft": "SFT",
    "gspo": "GSPO",
    "dapo": "DAPO",
    "cispo": "CISPO",
    "ipo": "IPO",
    "kto": "KTO",
    "orpo": "ORPO",
    "simpo": "SimPO",
    "reinforce_pp": "REINFORCE++",
    "rm": "reward model",
}
"""Proper names of methods; any other name is shown as the user wrote it. The first eight have their own colors."""


def measure_of(name: str) -> Measure:
    """Return a metric in words, by its name in metrics.jsonl; one that is not known keeps its name, with blanks."""
    bare = name.removeprefix("eval/")
    for pattern, title, unit in EVALUATIONS if bare != name else MEASURES:
        if match := re.fullmatch(pattern, bare):
            word = next((group for group in match.groups() if group), "")
            return Measure(title.format(word) if "{}" in title else f"{title} ({word})" if word else title, unit)
    words = bare.replace("_", " ").replace("/", ": ")
    return Measure(words[:1].upper() + words[1:], "value")


def method_name(method: str) -> str:
    """Return the proper name of a method: `RePULSe, alpha=0.1` of `repulse-alpha=0.1`."""
    first, *rest = method.split("-")
    return ", ".join([METHODS.get(first, first.replace("_", " ")), *rest])


def colors_of(methods: Iterable[str]) -> dict[str, int]:
    """Return the number of each method's color. It follows from the name alone, but where two of the methods would share it."""
    usual = {name: number for number, name in enumerate(list(METHODS)[: len(COLORS)])}
    names = sorted(dict.fromkeys(methods), key=lambda each: (each not in usual, each))
    chosen: dict[str, int] = {}
    for name in names:
        wanted = usual.get(name, zlib.crc32(name.encode()) % len(COLORS))
        free = [k for k in range(len(COLORS)) if k not in chosen.values()] or [wanted]
        chosen[name] = wanted if wanted in free else free[0]
    return chosen


def smooth(values: Sequence[float], weight: float = 0.7) -> list[float]:
    """Return the exponential moving mean of values, without the bias of its beginning."""
    means, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = weight * total + (1 - weight) * value, weight * mass + (1 - weight)
        means.append(total / mass)
    return means


def thin(count: int, most: int = MOST) -> list[int]:
    """Return which of `count` points to draw: all, or `most` at even distances with the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(k * (count - 1) / (most - 1)) for k in range(most)})
