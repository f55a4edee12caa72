"""Lanes of tiny models, for tests of losses and gradients."""

from __future__ import annotations

from typing import Any

import torch
from tiny_attacks import family, tiny

from rlhf_eval_gcg.attack import Attack, AttackPrompt, Goal
from rlhf_eval_gcg.attack.lane import Lane
from rlhf_eval_gcg.attack.search import _lane
from rlhf_eval_gcg.attack.victim import Victim

GOAL = Goal("Say hello", "Sure, hello friend")


def lane(
    name: str = "qwen",
    goal: Goal = GOAL,
    model: Any = None,
    cached: bool = True,
    packs: bool | None = None,
    **changes: Any,
) -> tuple[Lane, Attack]:
    """Return the lane of a goal on a model (a tiny one of the family's vocabulary), and its options.

    `packs` False pads rows of a batch, as on an accelerator; True asserts that the model packs them.
    """
    options = Attack(**({"suffix": "x x x !", "prefix_cache": cached} | changes))
    model = tiny(len(family(name))) if model is None else model
    made = _lane(Victim(model, options.prefix_cache), AttackPrompt.build(goal, family(name), options), options)
    assert made.cached == cached
    if packs is not None:
        assert made.victim.packs or not packs
        made.victim.packs = packs
    made.open()
    return made, options


def neighbors(made: Lane, count: int, replace: int = 1, seed: int = 0) -> torch.Tensor:
    """Return candidates (C, L) that differ from the initial suffix in `replace` random tokens."""
    draw = torch.Generator().manual_seed(seed)
    first_L = torch.tensor(made.prompt.suffix_ids)
    places = torch.rand(count, len(first_L), generator=draw).argsort(1)[:, :replace]
    ids = torch.randint(made.victim.vocabulary, places.shape, generator=draw)
    return first_L.repeat(count, 1).scatter(1, places, ids)
