"""Invariance of losses, gradients and credit to padding, order, micro-batches and ranks (hypothesis).

Completions have one to seven tokens, the policy's and an environment's mixed as in several turns; groups have one to four.
Losses are reduced as core does it, with `count` and `weighted_sum`; ranks are parts whose counts are summed first.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_algos.advantage.dr_grpo import DrGRPOAdvantage as Centerd
from rlhf_algos.advantage.gae import GAEAdvantage
from rlhf_algos.advantage.reinforce_pp_baseline import ReinforcePPBaselineAdvantage
from rlhf_algos.advantage.rloo import RLOOAdvantage
from rlhf_algos.correction import Correction
from rlhf_algos.loss.bradley_terry import BradleyTerryLoss
from rlhf_algos.loss.cispo import CISPOLoss
from rlhf_algos.loss.clip import ClipLoss
from rlhf_algos.loss.distill import DistillLoss
from rlhf_algos.loss.dpo import DPOLoss
from rlhf_algos.loss.dr_grpo import DrGRPOLoss
from rlhf_algos.loss.entropy import EntropyLoss
from rlhf_algos.loss.grpo import GRPOLoss
from rlhf_algos.loss.gspo import GSPOLoss
from rlhf_algos.loss.ipo import IPOLoss
from rlhf_algos.loss.kto import KTOLoss
from rlhf_algos.loss.orpo import ORPOLoss
from rlhf_algos.loss.reinforce import ReinforceLoss
from rlhf_algos.loss.sft import SFTLoss
from rlhf_algos.loss.simpo import SimPOLoss
from rlhf_algos.loss.value import ValueLoss
from rlhf_algos.loss.weighted_nll import WeightedNLLLoss
from rlhf_core.contract.batch import Batch, Rollouts, StepInfo
from rlhf_core.contract.results import RewardOutput
from rlhf_core.testing.batches import make_batch
from rlhf_core.training.kl import KLLoss
from rlhf_core.training.reduction import count, weighted_sum

EXTRAS = ("old_logprobs_NT", "ref_logprobs_NT", "sampler_logprobs_NT", "advantages_NT", "returns_NT", "values_NT")
LOSSES: list[Any] = [
    ClipLoss(),
    ClipLoss(dual_clip=2.0, correction=Correction("sequence", "mask")),
    GRPOLoss(),
    DrGRPOLoss(length=7),
    GSPOLoss(clip_low=0.2, clip_high=0.2),
    CISPOLoss(),
    ReinforceLoss(),
    ValueLoss(),
    SFTLoss(),
    EntropyLoss(),
    DistillLoss(),
    KTOLoss(),
    WeightedNLLLoss(),
    KLLoss("k3", unbiased=True),
    DPOLoss(),
    IPOLoss(per="token"),
    SimPOLoss(),
    ORPOLoss(),
    BradleyTerryLoss(),
]


@st.composite
def batches(draw: Any) -> Rollouts:
    """2 to 5 groups of 1 to 4 completions, or as many pairs; float64 noise for everything that losses read."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    lengths = draw(st.lists(st.integers(1, 7), min_size=len(groups), max_size=len(groups)))
    seed = draw(st.integers(0, 9999))
    batch = make_batch(lengths, groups=groups)
    noise = torch.Generator().manual_seed(seed)
    said_NT = torch.rand(batch.mask_NT.shape, generator=noise) < 0.7
    said_NT[:, 0] = True  # somebody's first word is the policy's
    batch.mask_NT &= said_NT
    return with_noise(batch, noise)


def with_noise(batch: Rollouts, noise: torch.Generator) -> Rollouts:
    normal = lambda *shape: torch.randn(*shape, generator=noise, dtype=torch.float64)
    shape = tuple(batch.mask_NT.shape)
    extras = {name: 0.4 * normal(*shape) - 2 * name.endswith("logprobs_NT") for name in EXTRAS}
    outputs = {f"out_{name}_NT": 0.4 * normal(*shape) for name in ("values", "entropy", "divergence")}
    outputs |= {f"out_{name}_NT": 0.4 * normal(*shape) - 2 for name in ("logprobs", "full_logprobs")}
    outputs |= {"out_scores_N": normal(len(batch))}
    batch.step = StepInfo(kl_coef=0.3)
    rewards = {"rewards_N": normal(len(batch)), "rewards_NT": 0.1 * normal(*shape) * batch.mask_NT}
    return batch.with_extras(**extras, **outputs, **rewards)


def reduced(loss: Any, parts: list[Batch]) -> tuple[float, list[torch.Tensor]]:
    """The loss over parts of a batch, and the gradient of every row's wanted outputs, rows in the order of the parts."""
    unit = getattr(loss, "rows_per_unit", 1)
    names = {name: f"out_{name.replace('teacher.forward', 'divergence')}" for name in sorted(loss.outputs)}
    total, rows = torch.zeros(()).double(), []
    for part in parts:
        outputs = {name: part[extra].clone().requires_grad_() for name, extra in names.items()}
        result = loss(outputs, part)
        counts = sum(count(result.reduction, each, unit) for each in parts)
        if result.reduction.per == "prompt":  # groups are never cut by ranks, but here by micro-batches
            counts = len({int(group) for each in parts for group in each.group_N})
        share = weighted_sum(result.values.float(), result.reduction, part) / counts
        gradients = torch.autograd.grad(share, list(outputs.values()), materialize_grads=True)
        rows += [[g[i] if g.dim() == 1 else g[i][part.mask_NT[i]] for g in gradients] for i in range(len(part))]
        total += share.detach()
    return float(total), rows


def padded(batch: Batch, more: int) -> Batch:
    """With columns of noise on the right."""
    pad = lambda x_NT: torch.nn.functional.pad(x_NT, (0, more), value=7)
    wide = batch.with_extras(**{name: pad(x) for name, x in batch.extras.items() if name.endswith("_NT")})
    wide.tokens_NT, wide.mask_NT = pad(batch.tokens_NT), torch.nn.functional.pad(batch.mask_NT, (0, more))
    return wide


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@settings(max_examples=10, deadline=None)
@given(batch=batches(), seed=st.integers(0, 999), cuts=st.integers(1, 4), more=st.integers(0, 3))
def test_no_loss_or_gradient_depends_on_how_a_batch_is_cut(
    loss: Any, batch: Rollouts, seed: int, cuts: int, more: int
) -> None:
    if getattr(loss, "rows_per_unit", 1) == 2:  # pairs
        batch = batch.rows(range(len(batch) // 2 * 2))
        batch.group_N = torch.arange(len(batch)) // 2
    units = torch.arange(len(batch)).view(-1, getattr(loss, "rows_per_unit", 1))
    order = units[torch.randperm(len(units), generator=torch.Generator().manual_seed(seed))]
    whole, expected = reduced(loss, [batch])
    pieces = [padded(batch.rows(rows.flatten()), more) for rows in order.tensor_split(cuts) if len(rows)]
    total, got = reduced(loss, pieces)
    assert total == pytest.approx(whole, rel=1e-5, abs=1e-6)
    for i, row in zip(order.flatten().tolist(), got, strict=True):
        for gradient, other in zip(row, expected[i], strict=True):
            torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "advantage", [GAEAdvantage(), Centerd(std=True), RLOOAdvantage(), ReinforcePPBaselineAdvantage()], ids=repr
)
@settings(max_examples=15, deadline=None)
@given(batch=batches(), seed=st.integers(0, 999), more=st.integers(0, 3))
def test_no_credit_depends_on_order_padding_or_what_others_say_between_turns(
    advantage: Any, batch: Rollouts, seed: int, more: int
) -> None:
    if len(batch.group_N.unique()) == len(batch):
        batch.group_N = torch.zeros_like(batch.group_N)  # somebody to compare with
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    credit = advantage(rewards_of(batch), batch, batch.extras)
    moved: Any = padded(batch.rows(order), more)
    moved.extras["values_NT"] = torch.where(moved.mask_NT, moved["values_NT"], 1e6)  # a critic says nothing of them
    other = advantage(rewards_of(moved), moved, moved.extras)
    for k, i in enumerate(order.tolist()):
        mine, theirs = credit.advantages_NT[i][batch.mask_NT[i]], other.advantages_NT[k][moved.mask_NT[k]]
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
        assert not other.advantages_NT[k][~moved.mask_NT[k]].any()


def rewards_of(batch: Batch) -> RewardOutput:
    return RewardOutput(batch["rewards_N"].float(), (batch["rewards_NT"] * batch.mask_NT).float())
