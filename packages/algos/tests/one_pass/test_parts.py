"""Parts of estimators that no golden run sees: curvature of a batch, restored counts, rounding, late negative directions."""

from __future__ import annotations

import pytest
import torch
from streams import f64, stream

from rlhf_algos.one_pass import Dense, Direction, Mle, OmdCg, OmdMemoryless, direction, released_iteration, slopes
from rlhf_core import UsageError


@pytest.mark.parametrize("batches", [1, 3])
def test_the_memoryless_curvature_is_the_ridge_plus_the_mean_of_the_last_batch(batches: int) -> None:
    estimator = OmdMemoryless(6, total=10, eta=0.5)
    parts = stream(12, d=6)[0].split(4)[:batches]
    for z in parts:
        estimator.step(z)
    z, v = parts[-1], torch.arange(1.0, 7.0, dtype=torch.float64)
    mean_H = z.T @ (slopes(z, estimator.theta_D)[:, None] * z) / 4
    torch.testing.assert_close(estimator.curvature.apply(v), 0.8 * batches / 10 * v + mean_H @ v)


def test_a_restored_state_brings_its_own_schedule_and_counts() -> None:
    z_TD = stream(8, d=6)[0]
    long, short = OmdMemoryless(6, total=100), OmdMemoryless(6, total=3)
    long.step(z_TD)
    short.load_state_dict(long.state_dict())
    for estimator in (long, short):
        estimator.step(z_TD)
    assert torch.equal(short.theta_D, long.theta_D)
    solved, restored = OmdCg(6), OmdCg(6)
    solved.step(z_TD)
    restored.load_state_dict(solved.state_dict())
    assert restored.products == solved.products > 0


def test_rounding_below_zero_is_no_uncertainty() -> None:
    assert Dense(f64(-1e-18)[:, None]).norm_inverse(f64((1.0,))).tolist() == [0.0]


def test_a_negative_direction_after_the_first_one_keeps_what_was_solved() -> None:
    """Along g = (2, 1) the curvature of diag(1, -1) is 3 / 5, so that the step is 5 / 3 of g. The next direction bends down."""
    g_D = torch.tensor([2.0, 1.0], dtype=torch.float64)
    bend = torch.tensor([1.0, -1.0], dtype=torch.float64).mul
    found = direction(Direction(0.0, "constant", steps=5), bend, g_D, 1, 9)
    torch.testing.assert_close(found, 5 / 3 * g_D)


def test_the_gradient_of_a_refit_is_that_of_the_loss_its_line_search_sees() -> None:
    z_TD, theta_D = stream(20, d=4)
    estimator, h = Mle(4, damping=3.0), 1e-6
    slope_D = [
        (estimator._loss(z_TD, theta_D + h * e) - estimator._loss(z_TD, theta_D - h * e)) / (2 * h)
        for e in torch.eye(4, dtype=torch.float64)
    ]
    assert estimator._gradient(z_TD, theta_D).tolist() == pytest.approx(slope_D, rel=1e-7)


def test_products_of_a_refit_are_those_of_its_matrix_whatever_the_damping() -> None:
    z_TD, theta_D = stream(20, d=4)
    estimator = Mle(4, damping=3.0)
    matrix_DD = estimator._hessian(z_TD, theta_D)
    v_D = torch.arange(1.0, 5.0, dtype=torch.float64)
    torch.testing.assert_close(estimator._product(z_TD, slopes(z_TD, theta_D), v_D), matrix_DD @ v_D)
    found = torch.autograd.functional.hessian(
        lambda at_D: -torch.nn.functional.logsigmoid(z_TD @ at_D).sum() + 1.5 * at_D @ at_D, theta_D
    )
    torch.testing.assert_close(matrix_DD, found)


def test_a_refit_that_does_not_arrive_is_refused_in_one_line_and_restores_its_cost() -> None:
    with pytest.raises(UsageError, match="the fit of 20 pairs ended with a gradient of .*, above 1e-10; raise damping"):
        Mle(4, iterations=1).step(stream(20, d=4)[0])
    fitted, restored = Mle(4), Mle(4)
    fitted.step(stream(20, d=4)[0])
    restored.load_state_dict(fitted.state_dict())
    assert restored.gradients == fitted.gradients > 0


def test_the_solver_for_many_features_forms_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mle, "_hessian", lambda *_: pytest.fail("a matrix was formed"))
    estimator = Mle(4, solver="lbfgs", damping=3.0)
    z_TD = stream(20, d=4)[0]
    estimator.step(z_TD)
    assert float(estimator._gradient(z_TD, estimator.theta_D).norm()) <= 1e-10


def test_the_released_iteration_has_its_constants() -> None:
    one = torch.ones(1, dtype=torch.float64)
    assert float(released_iteration(lambda v: 1e-8 * v, one, 1).x_D) == pytest.approx(0.5e8)  # 1 / (1e-8 + 1e-8)
    assert released_iteration(lambda v: v, one, 3).products == 1  # r^T r is 1e-16, below 1e-10


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_a_refit_without_ridge_is_refused_in_one_line(damping: float) -> None:
    with pytest.raises(UsageError, match=f"curvature is singular with damping {damping}; damping must be above 0"):
        Mle(3, damping=damping)
