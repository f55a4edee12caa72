"""Completions that move to another rank arrive as they were, and take fewer bytes than a pickle of them would."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import pytest
import torch

from rlhf_core.contract.batch import Rollouts, StepInfo
from rlhf_core.contract.distributed import World
from rlhf_core.contract.kept_sets import KeptSets, Truncation
from rlhf_core.contract.results import RewardOutput, ScoredRollouts
from rlhf_core.testing.batches import make_batch, values_like
from rlhf_core.training import moved_groups
from rlhf_core.training.moved_groups import from_bytes, to_bytes
from rlhf_core.util.tensor_tree import same_tree


@dataclass(frozen=True)
class Answer:
    """A label of a type of the user's own."""

    text: str


def scored(labels: list[Any], meta: list[Any]) -> ScoredRollouts:
    """Two completions with everything that a batch can hold."""
    batch = make_batch([3, 2], groups=[4, 4])
    rollouts = replace(
        batch,
        texts=["é\n", '"quoted" \U0001f600'],
        raw_texts=["é\n</s>", ""],
        labels=labels,
        meta=meta,
        images=[MappingProxyType({"pixel_values": torch.rand(2, 3).bfloat16()}), {}],
        kept_sets=[KeptSets.from_lists([[1, 2], [], [3]]), Truncation(top_p=0.5, holes=(7, 9))],
        extras={"sampler_logprobs_NT": values_like(batch).float(), "versions_NT": batch.tokens_NT},
        scalars={"kept_mass": 0.25},
        finish=["length", "stop"],
        step=StepInfo(3),
        world=World(),
    )
    rewards = RewardOutput(
        torch.tensor([1.5, float("nan")]),
        scores_N=torch.tensor([0.1, 0.2]),
        metrics={"x": torch.tensor([1.0, 2.0])},
        known={"x": torch.tensor([True, False])},
        abstained_N=torch.tensor([False, True]),
        precision=0.01,
    )
    return ScoredRollouts(rollouts, rewards, failed=True)


def plain(thing: ScoredRollouts) -> Any:
    """The content of all fields, in the types that `same_tree` compares."""

    def of(value: Any) -> Any:
        if isinstance(value, (KeptSets, Truncation, RewardOutput, Rollouts, ScoredRollouts)):
            return {
                each.name: of(getattr(value, each.name)) for each in fields(value) if each.name not in ("step", "world")
            }
        if isinstance(value, (dict, MappingProxyType)):
            return {key: of(each) for key, each in value.items()}
        return [of(each) for each in value] if isinstance(value, list) else value

    return of(thing)


PLAIN = ([{"a": (1, None)}, 2.5], [{"prompt": ({"role": "user", "content": "é"},)}, {}])
OWN = ([Answer("x"), {1, 2}], [{"row": Answer("y")}, {}])


@pytest.mark.parametrize(("labels", "meta"), [PLAIN, OWN])
def test_what_moves_arrives_as_it_was(labels: list[Any], meta: list[Any]) -> None:
    sent = scored(labels, meta)
    like = replace(make_batch([1]), step=StepInfo(8), world=World())
    got = from_bytes(to_bytes(sent), like)
    assert same_tree(plain(got), plain(sent))
    assert (got.rollouts.step, got.rollouts.world) == (like.step, like.world)


def test_nothing_is_pickled_but_data_that_json_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = scored(*PLAIN)
    monkeypatch.setattr(moved_groups, "pickle", None)
    from_bytes(to_bytes(sent), sent.rollouts)
    with pytest.raises(AttributeError):
        to_bytes(scored(*OWN))


def test_what_moves_is_little_more_than_its_tensors_and_texts() -> None:
    """A pickle of a tensor is a zip file of its own."""
    rollouts = make_batch([64] * 8)
    moved = ScoredRollouts(rollouts, RewardOutput(torch.zeros(8)))
    tensors = [each for each in vars(rollouts).values() if isinstance(each, torch.Tensor)]
    size = len(to_bytes(moved))
    assert sum(each.nbytes for each in tensors) < size < sum(each.nbytes for each in tensors) + 2500
    assert size < len(pickle.dumps(moved))
