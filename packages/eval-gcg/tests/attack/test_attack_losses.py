"""Losses of an answer: against torch's own functions, and against their limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_eval_gcg.attack.lane import Answers
from rlhf_eval_gcg.attack.losses import answer_losses, carlini_wagner, cross_entropy, greedy_matches, mellowmax

LOGITS_RTV = torch.randn(5, 4, 11, generator=torch.Generator().manual_seed(0)) * 3
IDS_RT = torch.randint(11, (5, 4), generator=torch.Generator().manual_seed(1))


def test_cross_entropy_is_that_of_torch() -> None:
    expected = torch.nn.functional.cross_entropy(LOGITS_RTV.flatten(0, 1).double(), IDS_RT.flatten(), reduction="none")
    torch.testing.assert_close(cross_entropy(LOGITS_RTV, IDS_RT).flatten().double(), expected, atol=1e-5, rtol=0)
    mean, total = answer_losses(LOGITS_RTV, IDS_RT, "cross_entropy"), answer_losses(LOGITS_RTV, IDS_RT, "likelihood")
    torch.testing.assert_close(mean.double(), expected.view(5, 4).mean(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(total.double(), expected.view(5, 4).sum(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_on_a_cpu_sums_few_logits_at_a_time(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_eval_gcg.attack.losses.CACHED_CELLS", 40)
    logits_RTV = LOGITS_RTV.to(dtype)
    expected = torch.nn.functional.cross_entropy(logits_RTV.flatten(0, 1).double(), IDS_RT.flatten(), reduction="none")
    taken: list[int] = []

    class Sums(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten.logsumexp.default, torch.ops.aten._to_copy.default):
                taken.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    with Sums():
        found = cross_entropy(logits_RTV, IDS_RT)
    torch.testing.assert_close(found.flatten().double(), expected, atol=1e-5, rtol=0)
    assert max(taken) == 33  # three positions of 11 tokens at a time


def test_mellowmax_tends_to_the_maximum_and_to_the_mean() -> None:
    values = torch.randn(6, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(mellowmax(values, 1e4), values.amax(1), atol=1e-3, rtol=0)
    torch.testing.assert_close(mellowmax(values, 1e-4), values.mean(1), atol=1e-3, rtol=0)


def test_mellowmax_reads_logits_as_the_original_does() -> None:
    chosen = LOGITS_RTV.gather(2, IDS_RT[..., None])[..., 0]
    expected = ((2.0 * -chosen).exp().mean(1)).log() / 2.0
    torch.testing.assert_close(answer_losses(LOGITS_RTV, IDS_RT, "mellowmax", alpha=2.0), expected, atol=1e-5, rtol=0)


def test_carlini_wagner_is_the_margin_to_the_runner_up() -> None:
    for row in range(5):
        for t in range(4):
            token = int(IDS_RT[row, t])
            others = [float(LOGITS_RTV[row, t, v]) for v in range(11) if v != token]
            expected = max(max(others) - float(LOGITS_RTV[row, t, token]), -0.5)
            found = float(carlini_wagner(LOGITS_RTV, IDS_RT, 0.5)[row, t])
            assert found == pytest.approx(expected, abs=1e-6)


def test_a_row_matches_if_every_token_is_the_likeliest() -> None:
    ids = LOGITS_RTV.argmax(2)
    ids[1, 3] = (ids[1, 3] + 1) % 11
    assert greedy_matches(LOGITS_RTV, ids).tolist() == [True, False, True, True, True]


def test_several_answers_become_minus_the_log_of_their_summed_probability() -> None:
    losses_KC = torch.tensor([[1.0, 2.0], [3.0, 0.5]], dtype=torch.float64)
    expected = -((-losses_KC).exp().sum(0)).log()
    torch.testing.assert_close(Answers((), "likelihood", None).combine(losses_KC), expected)
    weighted = Answers((), "cross_entropy", (2.0, -1.0)).combine(losses_KC)
    assert weighted.tolist() == [-1.0, 3.5]
