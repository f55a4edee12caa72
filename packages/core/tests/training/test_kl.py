"""KL estimators and the adaptive coefficient, against enumeration and published values."""

from __future__ import annotations

from math import exp

import pytest
import torch
from thread_ranks import ThreadWorld, together

from rlhf_core.contract.batch import Batch, StepInfo
from rlhf_core.contract.options import KL
from rlhf_core.testing.batches import make_batch
from rlhf_core.training.kl import KLController, KLLoss, kl_terms, kl_values
from rlhf_core.training.step_metrics import Meter

ONE = torch.ones(1, 1, dtype=torch.bool)


@pytest.mark.parametrize(("estimator", "value"), [("k1", -0.06035), ("k2", 0.0018211), ("k3", 0.0018585)])
def test_the_three_estimators_at_a_known_log_ratio(estimator: str, value: float) -> None:
    """d = -0.06035; values computed by hand from Schulman's definitions."""
    got = kl_values(torch.tensor([[-0.06035]]), torch.zeros(1, 1), ONE, estimator)  # type: ignore[arg-type]
    assert float(got) == pytest.approx(value, rel=2e-4)


def test_expectations_of_k1_and_k3_are_the_kl_by_enumeration() -> None:
    logp, logq = (torch.randn(7, generator=torch.Generator().manual_seed(s)).log_softmax(0) for s in (1, 2))
    exact = float((logp.exp() * (logp - logq)).sum())
    for estimator in ("k1", "k3"):
        mask = torch.ones(7, 1, dtype=torch.bool)
        values = kl_values(logp[:, None], logq[:, None], mask, estimator)[:, 0]  # type: ignore[arg-type]
        assert float((logp.exp() * values).sum()) == pytest.approx(exact, rel=1e-5)


def test_the_gradient_of_k2_is_in_expectation_that_of_the_kl() -> None:
    """E_pi[grad k2] = grad KL(pi || ref), by enumeration; k1's expected gradient vanishes."""
    logits = torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    ref = torch.randn(6, generator=torch.Generator().manual_seed(4), dtype=torch.float64).log_softmax(0)
    mask = torch.ones(6, 1, dtype=torch.bool)
    (exact,) = torch.autograd.grad((logits.softmax(0) * (logits.log_softmax(0) - ref)).sum(), logits)
    for estimator, expected in (("k2", exact), ("k1", torch.zeros(6))):
        values = kl_values(logits.log_softmax(0)[:, None], ref[:, None], mask, estimator)[:, 0]  # type: ignore[arg-type]
        (got,) = torch.autograd.grad((logits.softmax(0).detach() * values).sum(), logits)
        torch.testing.assert_close(got.float(), expected.float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_unbiased_form_has_the_gradient_of_the_kl_on_samples_of_an_older_policy_too(estimator: str) -> None:
    """E_old[w grad] = grad KL(pi || ref) by enumeration over six tokens, whatever estimate is reported."""
    draw = lambda seed: torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits, old, ref = draw(3).requires_grad_(), draw(5).log_softmax(0), draw(4).log_softmax(0)
    (exact,) = torch.autograd.grad((logits.softmax(0) * (logits.log_softmax(0) - ref)).sum(), logits)
    batch = make_batch([1] * 6).with_extras(ref_logprobs_NT=ref[:, None], old_logprobs_NT=old[:, None])
    batch.step = StepInfo(kl_coef=1.0)
    loss = KLLoss(estimator, unbiased=True)  # type: ignore[arg-type]
    now = logits.log_softmax(0)[:, None]
    values = loss({"logprobs_NT": now, "full_logprobs_NT": now}, batch).values
    plain = kl_values(logits.log_softmax(0)[:, None], ref[:, None], batch.mask_NT, estimator)  # type: ignore[arg-type]
    torch.testing.assert_close(values, plain)
    assert float((logits.detach().log_softmax(0) - old).max()) < 2.3, "no weight is bounded"
    (got,) = torch.autograd.grad((old.exp()[:, None] * values).sum(), logits)
    torch.testing.assert_close(got.float(), exact.float(), atol=1e-6, rtol=1e-5)
    assert loss.needs == {"ref_logprobs_NT", "old_logprobs_NT"}


def test_the_weight_of_a_sample_of_an_older_policy_is_at_most_ten() -> None:
    """Slope of k2 times the weight: ratios e^5 and e^1 weigh 10 and e."""
    logprobs = torch.tensor([[-1.0], [-1.0]], requires_grad=True)
    batch = make_batch([1, 1]).with_extras(
        ref_logprobs_NT=torch.tensor([[-1.5], [-1.5]]), old_logprobs_NT=torch.tensor([[-6.0], [-2.0]])
    )
    batch.step = StepInfo(kl_coef=1.0)
    values = KLLoss("k3", unbiased=True)({"logprobs_NT": logprobs, "full_logprobs_NT": logprobs}, batch).values
    values.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad[:, 0].tolist() == pytest.approx([10 * 0.5, exp(1) * 0.5])


def test_extreme_log_ratios_and_masked_cells_give_finite_values_and_gradients() -> None:
    logprobs = torch.tensor([[-200.0, float("nan")]], requires_grad=True)
    kl = kl_values(logprobs, torch.zeros(1, 2), torch.tensor([[True, False]]), "k3")
    kl.sum().backward()
    assert torch.isfinite(kl).all() and torch.isfinite(logprobs.grad).all()  # type: ignore[arg-type]
    assert kl[0, 1].item() == 0.0


def test_the_adaptive_coefficient_has_the_published_value() -> None:
    """beta .1, target 6, KL 12, 256 completions, horizon 10,000 gives .100512; a fixed one stays."""
    adaptive = KLController(KL(coef=0.1, target=6.0, horizon=10000))
    adaptive.update(12.0, 256)
    assert adaptive.coef == pytest.approx(0.100512)
    fixed = KLController(KL(coef=0.1))
    fixed.update(12.0, 256)
    assert fixed.coef == 0.1


def test_the_penalty_as_a_loss_is_the_coefficient_times_the_estimate() -> None:
    batch = make_batch([2, 1])
    batch.extras["ref_logprobs_NT"] = torch.zeros(2, 2)
    batch.step = StepInfo(kl_coef=0.5)
    result = KLLoss("k2")({"full_logprobs_NT": torch.full((2, 2), 2.0, requires_grad=True)}, batch)
    assert result.values.tolist() == [[1.0, 1.0], [1.0, 0.0]]
    assert result.reduction.per == "token"


def test_the_penalty_is_a_term_only_when_it_belongs_in_the_loss() -> None:
    assert kl_terms(KL(where="reward"), "actor", "actor", None) == ()
    assert kl_terms(KL(coef=0.0, where="loss"), "actor", "actor", None) == ()
    assert kl_terms(None, "actor", "actor", None) == ()
    (term,) = kl_terms(KL(where="loss", estimator="k2"), "actor", "actor", None)
    assert (term.role, term.source, term.loss) == ("actor", "actor", KLLoss("k2"))


def test_the_kl_is_that_of_the_policy_and_waits_for_the_training_pass_where_only_an_engine_knows_it() -> None:
    """An engine's log-probabilities are off by 0.1 a token; the trainer's are the reference's: the KL is 0."""
    batch = make_batch([2, 1])
    ref_NT = -2.0 * batch.mask_NT
    batch = batch.with_extras(ref_logprobs_NT=ref_NT, sampler_logprobs_NT=ref_NT + 0.1 * batch.mask_NT)
    controller = KLController(KL(coef=0.1, target=6.0, horizon=10))

    def settled(batch: Batch, logged: dict[str, float]) -> dict[str, float]:
        meter = Meter()
        controller.measure("actor", batch, meter)
        meter.log(logged)
        return controller.settle(meter.take())

    found = settled(batch, {"actor/kl": 4.0})  # the mean over 3 tokens, of 2 completions
    assert found == {"actor/kl": 4.0, "kl/mean": 4.0, "kl/completion": 6.0, "kl/coef": 0.1}
    assert settled(batch, {"loss/actor": 0.0}) == {"loss/actor": 0.0}, "a skipped step has none"
    exact = settled(batch.with_extras(old_logprobs_NT=ref_NT), {})
    assert exact["kl/mean"] == 0.0 and exact["kl/coef"] == 0.1 > controller.coef
    empty = batch.with_extras(old_logprobs_NT=ref_NT)
    empty.mask_NT = torch.zeros_like(empty.mask_NT)
    assert settled(empty, {})["kl/mean"] == 0.0


def test_the_kl_of_several_ranks_and_sources_is_added_up_in_the_step_s_one_reduction() -> None:
    """Ranks have 1 and 3 tokens of d = 1 and 0.5 (k1) of the actor, and a source that one rank alone has rows of."""

    def rank(world: ThreadWorld) -> tuple[dict[str, float], int]:
        controller, meter = KLController(KL(coef=0.1, estimator="k1")), Meter(world)
        tokens, d = ((1, 1.0), (3, 0.5))[world.rank]
        for source, batch in (("actor", make_batch([tokens])), ("other", make_batch([2]).rows([0] * (1 - world.rank)))):
            ref_NT = -2.0 * batch.mask_NT
            old_NT = ref_NT + d * batch.mask_NT
            controller.measure(source, batch.with_extras(ref_logprobs_NT=ref_NT, old_logprobs_NT=old_NT), meter)
        meter.log_largest("oldest", float(world.rank))
        return controller.settle(meter.take()), world.calls

    for found, calls in together(rank, 2):
        assert found["kl/mean"] == pytest.approx(((1.0 + 1.5) / 4 + 2.0 / 2) / 2)
        assert found["kl/completion"] == pytest.approx(((1.0 + 1.5) / 2 + 2.0 / 1) / 2)
        assert (found["kl/coef"], found["oldest"]) == (0.1, 1.0)
        assert calls == 3, "one reduction, and twice more for the new names of the first step"
        assert not [name for name in found if name.startswith(("kl/tokens", "kl/sum"))]
