"""The torch optimizer around an estimator, alone: what it writes, when it steps, what it logs and what it restores."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from streams import stream
from torch import nn

from rlhf_algos.one_pass import Omd
from rlhf_algos.one_pass.head_step import HeadStep


def head_step(lr: float = 1.0, **options: Any) -> HeadStep:
    """Return the step of a head of three features, whose weight begins elsewhere than its estimator."""
    weight = nn.Parameter(torch.ones(1, 3))
    return HeadStep([weight, nn.Parameter(torch.ones(1))], weight, lr, Omd(3, **options), average=False)


def rows(z_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features (N, D), chosen and rejected in turn, with these differences; and the rows of the data."""
    rejected_BD = torch.ones_like(z_BD)
    features_NH = torch.stack([z_BD + rejected_BD, rejected_BD], 1).flatten(0, 1)
    return features_NH, torch.arange(len(z_BD)).repeat_interleave(2)


def test_the_head_has_theta_from_the_start_and_each_batch_counts_once() -> None:
    step, z_TD = head_step(), stream(4, d=3)[0]
    assert not step.weight.any() and step.state[step.weight]["t"] == 0
    step.step()
    assert step.estimator.t == 0
    step.receive(*rows(z_TD))
    step.step()
    first = step.weight.clone()
    assert step.estimator.t == step.state[step.weight]["t"] == 4 and first.any()
    torch.testing.assert_close(first[0].detach().double(), step.estimator.theta_D, rtol=0, atol=1e-7)
    step.step()  # no new pairs
    assert step.estimator.t == 4 and torch.equal(step.weight, first)


def test_eta_is_the_learning_rate_of_the_moment() -> None:
    step, z_TD = head_step(), stream(6, d=3)[0]
    expected = Omd(3)
    for lr, z_BD in zip((1.0, 0.5, 0.25), z_TD.split(2), strict=True):
        step.param_groups[0]["lr"] = lr  # what a schedule does
        step.receive(*rows(z_BD))
        step.step()
        expected.eta = lr
        expected.step(z_BD)
    torch.testing.assert_close(step.estimator.theta_D, expected.theta_D, rtol=0, atol=1e-12)


def test_a_restored_step_has_the_estimator_the_learning_rate_and_the_head() -> None:
    step, z_TD = head_step(lr=0.5), stream(4, d=3)[0]
    step.receive(*rows(z_TD))
    step.step()
    other = head_step(lr=1.0)
    other.load_state_dict(step.state_dict())
    assert other.param_groups[0]["lr"] == 0.5
    assert torch.equal(other.weight, step.weight) and other.weight.any()
    assert torch.equal(other.estimator.theta_D, step.estimator.theta_D) and other.estimator.t == 4


def test_equal_features_are_logged_once_in_a_run(caplog: pytest.LogCaptureFixture) -> None:
    step = head_step()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            step.receive(*rows(torch.zeros(2, 3)))
    assert [record.message for record in caplog.records if "2 of 2 pairs have equal features" in record.message] == [
        caplog.records[0].message
    ]
