"""Schedules and decay groups."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_core.contract.optimizers import AdamW, parameter_groups
from rlhf_core.training.optimizer import lr_factor, make_optimizer


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (AdamW(), [1, 1, 1, 1, 1]),
        (AdamW(schedule="linear"), [1, 0.8, 0.6, 0.4, 0.2]),
        (AdamW(schedule="linear", min_lr_ratio=0.5), [1, 0.9, 0.8, 0.7, 0.6]),
        (AdamW(schedule="cosine"), [(1 + math.cos(math.pi * k / 5)) / 2 for k in range(5)]),
        (
            AdamW(schedule="cosine", min_lr_ratio=0.1),
            [0.1 + 0.9 * (1 + math.cos(math.pi * k / 5)) / 2 for k in range(5)],
        ),
        (AdamW(warmup=2), [1 / 3, 2 / 3, 1, 1, 1]),
        (AdamW(warmup=0.4, schedule="linear"), [1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]),
    ],
)
def test_a_schedule_has_these_values_over_five_steps(options: AdamW, expected: list[float]) -> None:
    assert [lr_factor(options, step, 5) for step in range(5)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_without_warm_up_are_those_of_transformers(schedule: str) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = get_scheduler(schedule, optimizer, 0, 7)
    for step in range(7):
        assert lr_factor(AdamW(schedule=schedule), step, 7) == pytest.approx(theirs.get_last_lr()[0])  # type: ignore[arg-type]
        optimizer.step()
        theirs.step()


def test_biases_and_norms_are_not_decayed_and_frozen_parameters_are_left_out() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Embedding(5, 4))
    module[2].weight.requires_grad_(False)
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decayed, free = parameter_groups(trained, 0.1)
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3)]
    assert [tuple(p.shape) for p in free["params"]] == [(4,), (4,), (4,)]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)


def test_adamw_follows_the_papers_update() -> None:
    """Two steps of Loshchilov and Hutter's algorithm 2 by hand, in float64."""
    layer = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.constant_(layer.weight, 2.0)
    options = AdamW(lr=0.1, weight_decay=0.5, betas=(0.9, 0.99), eps=1e-8)
    optimizer = make_optimizer(layer, options, 2)
    w, m, v = 2.0, 0.0, 0.0
    for t, gradient in enumerate((3.0, -1.0), start=1):
        layer.weight.grad = torch.full((1, 1), gradient, dtype=torch.float64)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        w -= 0.1 * (0.5 * w + (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.99**t)) + 1e-8))
        assert layer.weight.item() == pytest.approx(w, rel=1e-12)
