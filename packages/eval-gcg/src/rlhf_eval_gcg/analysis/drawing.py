"""The figure of a comparison: loss by floating-point operations, and attack success by threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_core.analysis.figures import figure
from rlhf_core.analysis.stats import share_below
from rlhf_eval_gcg.analysis.read import Group

__all__ = ["draw", "loss_by_flops", "success_by_threshold"]

POINTS = 60
Array = np.ndarray[Any, Any]


def draw(groups: Sequence[Group], stem: Path, formats: Sequence[str]) -> None:
    """Draw both panels, a color per group."""
    with figure(stem, formats, 2) as (losses, rates):
        for number, group in enumerate(groups):
            name = group.name if len({each.step for each in groups}) == 1 else f"{group.name}, step {group.step}"
            flops_K, loss_K = loss_by_flops(group.attacks)
            losses.plot(flops_K, loss_K, color=f"C{number}", label=name)
            for attacked, line in ((True, "-"), (False, ":")):
                thresholds_K, rate_K = success_by_threshold(groups, group.answers(attacked))
                label = name if attacked else f"{name}, no suffix"
                rates.plot(thresholds_K, rate_K, line, color=f"C{number}", label=label)
        losses.set_xscale("log")
        losses.set_xlabel("floating-point operations")
        losses.set_title("lowest loss so far, nats")
        rates.set_xlabel("threshold")
        rates.set_title("share of answers with a lower reward")
        losses.legend()
        rates.legend()


def loss_by_flops(attacks: Sequence[Mapping[str, Any]]) -> tuple[Array, Array]:
    """Return a grid of operations (K,) and the mean over attacks of the lowest loss so far (K,).

    The grid goes from where every attack has done a step to the end of the shortest one. The last loss of an attack that
    stopped early, with its target reached, counts on.
    """
    known = [row for row in attacks if row["losses"]]
    if not known:
        return np.array([]), np.array([])
    ends = [row["flops"][-1] for row in known if not row["matched"]] or [row["flops"][-1] for row in known]
    low, high = max(row["flops"][0] for row in known), min(ends)
    grid_K = np.geomspace(low, max(low, high), POINTS) if high > low else np.array([low])
    best = np.zeros(len(grid_K))
    for row in known:
        lowest_S = np.minimum(np.minimum.accumulate(row["losses"]), row["initial_loss"])
        at_K = np.searchsorted(row["flops"], grid_K * (1 + 1e-9), side="right") - 1  # 1e-9: geomspace rounds its ends
        best += lowest_S[np.maximum(at_K, 0)]
    return grid_K, best / len(known)


def success_by_threshold(groups: Sequence[Group], answers: Sequence[Mapping[str, Any]]) -> tuple[Array, Array]:
    """Return thresholds over the range of all groups' rewards (K,) and the share of answers below each (K,)."""
    every = [row["reward"] for group in groups for each in (True, False) for row in group.answers(each)]
    known = sorted({float(reward) for reward in every if reward is not None})
    own = [row["reward"] for row in answers if row["reward"] is not None]
    if not known or not own:
        return np.array([]), np.array([])
    margin = 0.02 * (known[-1] - known[0]) or 1.0
    thresholds_K = np.linspace(known[0] - margin, known[-1] + margin, POINTS)
    return thresholds_K, np.array([share_below(own, threshold) for threshold in thresholds_K])
