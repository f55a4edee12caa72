"""Estimators on streams of pairs: golden runs, one way of computing against another, and against the offline estimate."""

from __future__ import annotations

import statistics

import pytest
import torch
from streams import f64, stream

from rlhf_algos.one_pass import (
    Dense,
    Direction,
    FirstOrder,
    LowRank,
    Mle,
    Omd,
    OmdCg,
    OmdMemoryless,
    gradient_sum,
    loss_sum,
    slopes,
)
from rlhf_core import UsageError

GOLDEN = {
    1.0: (
        [(0.4, 0.0), (0.4, -0.5), (0.7157259049, -0.2808038606)],
        [(1.4788013874, 0.2385406416), (0.2385406416, 2.0249883746)],
    ),
    2.0: (
        [(2 / 3, 0.0), (2 / 3, -2 / 3), (1.1444957206, -0.3143716555)],
        [(1.4355918291, 0.2114344392), (0.2114344392, 1.8717984778)],
    ),
}
SAMPLES = [((1, 0), 1), ((0, 2), 0), ((1, 1), 1)]
ONE_BY_ONE = {
    "rank one": lambda d, eta: Omd(d, eta=eta),
    "block": lambda d, eta: Omd(d, eta=eta, block=True),
    "conjugate gradient": lambda d, eta: OmdCg(d, eta=eta),
}


@pytest.mark.parametrize("way", ONE_BY_ONE)
@pytest.mark.parametrize("eta", GOLDEN)
def test_a_run_in_two_dimensions_has_the_published_trace(way: str, eta: float) -> None:
    estimator = ONE_BY_ONE[way](2, eta)
    thetas, curvature = GOLDEN[eta]
    for ((first, second), label), expected in zip(SAMPLES, thetas, strict=True):
        z = f64((first, second))
        estimator.step(z if label else -z)
        torch.testing.assert_close(estimator.theta_D, f64(*expected), rtol=0, atol=1e-9)
        if estimator.t == 1 and eta == 1:  # the look-ahead point; the old one would give 1.25
            diagonal = estimator.curvature.apply(torch.eye(2, dtype=torch.float64)).diagonal()
            torch.testing.assert_close(diagonal, f64(1.2402607457, 1.0), rtol=0, atol=1e-9)
    torch.testing.assert_close(
        estimator.curvature.apply(torch.eye(2, dtype=torch.float64)), f64(*curvature), rtol=0, atol=1e-9
    )
    average = torch.stack([f64(0.0, 0.0), *(f64(*theta) for theta in thetas)]).mean(0)
    torch.testing.assert_close(estimator.average_D, average, rtol=0, atol=1e-9)


def test_rank_one_updates_equal_a_direct_solve_over_2000_pairs() -> None:
    z_TD, _ = stream(2000)
    fast, theta, H = Omd(16, eta=1.3), torch.zeros(16, dtype=torch.float64), torch.eye(16, dtype=torch.float64)
    for z in z_TD:
        fast.step(z[None])
        p = torch.sigmoid(z @ theta)
        theta = theta + 1.3 * torch.linalg.solve(H + 1.3 * p * (1 - p) * torch.outer(z, z), (1 - p) * z)
        q = torch.sigmoid(z @ theta)
        H = H + q * (1 - q) * torch.outer(z, z)
    torch.testing.assert_close(fast.theta_D, theta, rtol=0, atol=1e-10)
    torch.testing.assert_close(fast.curvature.matrix_DD, H, rtol=1e-10, atol=1e-10)


def test_a_step_of_eta_one_is_a_newton_step_on_the_memory_plus_the_loss() -> None:
    z_TD, _ = stream(30, d=4)
    estimator = Omd(4)
    for z in z_TD.split(1):
        memory, before = estimator.curvature.matrix_DD, estimator.theta_D

        def objective(theta, memory=memory, before=before, z=z):
            return loss_sum(z, theta) + (theta - before) @ memory @ (theta - before) / 2

        live = before.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(objective(live), live, create_graph=True)
        H = torch.stack([torch.autograd.grad(each, live, retain_graph=True)[0] for each in g])
        newton = before - torch.linalg.solve(H, g.detach())
        estimator.step(z)
        torch.testing.assert_close(estimator.theta_D, newton, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pairs", [1, 7, 300])  # 300: more than one downdate takes
def test_a_block_is_one_step_on_summed_loss_and_curvature(pairs: int) -> None:
    z_BD, _ = stream(pairs, d=12)
    for estimator in (Omd(12, eta=0.7, block=True), OmdCg(12, eta=0.7, block=True, steps=40)):
        estimator.step(stream(5, d=12, seed=9)[0])
        theta, H = estimator.theta_D, estimator.curvature.apply(torch.eye(12, dtype=torch.float64))
        tilde = H + z_BD.T @ (0.7 * slopes(z_BD, theta)[:, None] * z_BD)
        expected = theta - 0.7 * torch.linalg.solve(tilde, gradient_sum(z_BD, theta))
        estimator.step(z_BD)
        torch.testing.assert_close(estimator.theta_D, expected, rtol=0, atol=1e-9)
        after = H + z_BD.T @ (slopes(z_BD, expected)[:, None] * z_BD)
        found = estimator.curvature.apply(torch.eye(12, dtype=torch.float64))
        torch.testing.assert_close(found, after, rtol=1e-9, atol=1e-9)


def test_means_with_damping_over_m_are_the_step_of_sums() -> None:
    z_BD, _ = stream(8, d=5)
    estimator = Omd(5, damping=2.0, block=True)
    estimator.step(z_BD)
    zero = torch.zeros(5, dtype=torch.float64)
    mean_H = z_BD.T @ (slopes(z_BD, zero)[:, None] * z_BD) / 8 + 2.0 / 8 * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(estimator.theta_D, -torch.linalg.solve(mean_H, gradient_sum(z_BD, zero) / 8))


def test_conjugate_gradient_on_the_accumulated_operator_is_the_exact_update() -> None:
    z_TD, _ = stream(500)
    exact, solved = Omd(16), OmdCg(16, steps=16)
    for z in z_TD.split(1):
        exact.step(z)
        solved.step(z)
        assert float((exact.theta_D - solved.theta_D).abs().max()) < 1e-8
    assert len(solved.curvature.factor_RD) <= 32
    truncated = OmdCg(16, steps=3, tolerance=0.0)
    truncated.step(z_TD)
    assert truncated.products == 3 * 500  # exactly K products an update


def test_the_memoryless_step_solves_its_own_system_and_not_the_accumulated_one() -> None:
    z_TD, _ = stream(40)
    estimator, exact = OmdMemoryless(16, total=40, eta=0.5, how=Direction(steps=16)), Omd(16)
    for t, z in enumerate(z_TD.split(4), 1):
        before = estimator.theta_D
        H = z.T @ (slopes(z, before)[:, None] / 4 * z) + 0.8 * t / 40 * torch.eye(16, dtype=torch.float64)
        expected = before - 0.5 * torch.linalg.solve(H, gradient_sum(z, before) / 4)
        estimator.step(z)
        exact.step(z)
        torch.testing.assert_close(estimator.theta_D, expected, rtol=1e-9, atol=1e-9)
    assert float((estimator.theta_D - exact.theta_D).norm()) > 0.1


@pytest.mark.parametrize("make", [lambda r: Omd(8, radius=r), lambda r: OmdCg(8, radius=r, steps=40)])
def test_projection_keeps_theta_in_the_ball_and_is_inactive_in_a_wide_one(make) -> None:
    z_TD, _ = stream(60, d=8, norm=6)
    narrow, wide, free = make(0.9), make(1e6), make(0.0)
    for z in z_TD.split(1):
        for estimator in (narrow, wide, free):
            estimator.step(z)
        assert float(narrow.theta_D.norm()) <= 0.9 + 1e-12
    assert torch.equal(wide.theta_D, free.theta_D) and float(free.theta_D.norm()) > 0.9


def test_both_ways_of_projecting_agree() -> None:
    z_TD, _ = stream(60, d=8, norm=6)
    dense, solved = Omd(8, radius=0.9), OmdCg(8, radius=0.9, steps=40)
    dense.step(z_TD)
    solved.step(z_TD)
    torch.testing.assert_close(dense.theta_D, solved.theta_D, rtol=0, atol=1e-8)


@pytest.mark.parametrize("solver", ["newton", "lbfgs"])
def test_the_offline_estimate_has_no_gradient_left(solver) -> None:
    z_TD, _ = stream(700)
    estimator = Mle(16, solver=solver, every=100)
    for z in z_TD.split(7):
        estimator.step(z)
    gradient = gradient_sum(z_TD, estimator.theta_D) + estimator.theta_D
    assert float(gradient.norm()) < 1e-10 and estimator.t == 1
    fresh = Mle(16)
    fresh.step(z_TD)
    torch.testing.assert_close(fresh.theta_D, estimator.theta_D, rtol=0, atol=1e-10)
    H = z_TD.T @ (slopes(z_TD, fresh.theta_D)[:, None] * z_TD) + torch.eye(16, dtype=torch.float64)
    torch.testing.assert_close(fresh.curvature.matrix_DD, H)


def test_newton_starts_warm_and_survives_a_steep_start() -> None:
    z_TD, _ = stream(400)
    estimator = Mle(16)
    estimator.step(z_TD[:399])
    cold = estimator.gradients / 399
    before = estimator.gradients
    estimator.step(z_TD[399:])
    assert (estimator.gradients - before) / 400 < cold
    far = Mle(16, theta_D=200 * stream(1, seed=5)[1])  # slopes of nearly 0: a whole Newton step overshoots
    far.step(z_TD)
    torch.testing.assert_close(far.theta_D, estimator.theta_D, rtol=0, atol=1e-9)


def test_one_pass_estimates_as_well_as_the_offline_fit_of_20_streams() -> None:
    ratios, accuracies, norms = [], [], []
    for seed in range(20):
        z_TD, theta = stream(2000, seed=seed)
        omd, mle = Omd(16), Mle(16)
        omd.step(z_TD)
        mle.step(z_TD)
        error = omd.theta_D - theta
        ratios.append(float(error.norm() / (mle.theta_D - theta).norm()))
        norms.append(float(error @ omd.curvature.matrix_DD @ error) ** 0.5)
        test_TD, _ = stream(4000, seed=10_000 + seed)
        p = torch.sigmoid(test_TD @ theta)
        right = [torch.where(test_TD @ e.theta_D > 0, p, 1 - p).mean() for e in (omd, mle)]
        accuracies.append(float(right[0] - right[1]))
    assert max(ratios) <= 1.10 and statistics.median(ratios) <= 1.05
    assert max(norms) < 8  # 2 sqrt(d)
    assert abs(statistics.mean(accuracies)) < 0.002


def test_a_low_rank_memory_keeps_the_trace_and_the_strong_directions() -> None:
    z_TD, theta = stream(300, d=40)
    z_TD = z_TD * torch.linspace(3, 0.01, 40, dtype=torch.float64).square()
    memory, wider = LowRank.ridge(40, 1.0, 10), LowRank.ridge(40, 1.0, 25)
    exact = torch.eye(40, dtype=torch.float64)
    for z in z_TD.split(7):
        memory.add(z, slopes(z, theta))
        wider.add(z, slopes(z, theta))
        exact += z.T @ (slopes(z, theta)[:, None] * z)
    found = memory.apply(torch.eye(40, dtype=torch.float64))
    assert len(memory.factor_RD) <= 20
    assert float(found.trace()) == pytest.approx(float(exact.trace()), rel=1e-9)
    assert float((found - exact).norm() / exact.norm()) < 0.2
    assert float((wider.apply(torch.eye(40, dtype=torch.float64)) - exact).norm() / exact.norm()) < 0.02
    v = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for curvature in (memory, Dense(torch.linalg.inv(found))):
        torch.testing.assert_close(curvature.solve(curvature.apply(v)), v, rtol=0, atol=1e-9)
        torch.testing.assert_close(curvature.solve(v)[1], curvature.solve(v[1]))
        torch.testing.assert_close(curvature.apply(v)[1], curvature.apply(v[1]))
        norms = torch.einsum("bd,de,be->b", v, torch.linalg.inv(found), v).sqrt()
        torch.testing.assert_close(curvature.norm_inverse(v), norms)


def test_first_order_estimators_step_on_mean_gradients() -> None:
    z_TD, _ = stream(6, d=3)
    estimator = FirstOrder(3, lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    estimator.step(z_TD)
    torch.testing.assert_close(estimator.theta_D, 0.25 * z_TD.mean(0))
    with pytest.raises(UsageError, match="has no curvature; use omd"):
        _ = estimator.curvature


MAKERS = {
    "omd": lambda d: Omd(d, radius=1.5),
    "block": lambda d: Omd(d, block=True),
    "omd_cg": lambda d: OmdCg(d, rank=3, steps=4),
    "omd_memoryless": lambda d: OmdMemoryless(d, total=20),
    "mle": lambda d: Mle(d, every=2),
    "sgd": lambda d: FirstOrder(d, lambda ps: torch.optim.SGD(ps, lr=0.5, momentum=0.9)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_restored_estimator_goes_on_to_the_bit(name: str) -> None:
    batches = stream(40, d=6)[0].split(4)
    straight, stopped = MAKERS[name](6), MAKERS[name](6)
    for z in batches[:5]:
        straight.step(z)
        stopped.step(z)
    resumed = MAKERS[name](6)
    resumed.load_state_dict(stopped.state_dict())
    for z in batches[5:]:
        straight.step(z)
        resumed.step(z)
    assert torch.equal(straight.theta_D, resumed.theta_D) and torch.equal(straight.average_D, resumed.average_D)
    assert straight.t == resumed.t > 0
    if name != "sgd":
        v = torch.ones(6, dtype=torch.float64)
        assert torch.equal(straight.curvature.solve(v), resumed.curvature.solve(v))


@pytest.mark.parametrize("name", MAKERS)
def test_bad_input_is_refused_in_one_line_and_changes_nothing(name: str) -> None:
    estimator = MAKERS[name](3)
    bad = f64((1, 2, 3), (1, float("nan"), 3))
    with pytest.raises(UsageError, match="features of pair 1 of 2 are not finite"):
        estimator.step(bad)
    with pytest.raises(UsageError, match=r"pairs have shape \(2, 4\); this estimator needs the shape \(pairs, 3\)"):
        estimator.step(torch.ones(2, 4))
    with pytest.raises(UsageError, match="stored state of .* has 5 features, but this reward head has 3"):
        estimator.load_state_dict(MAKERS[name](5).state_dict())
    with pytest.raises(UsageError, match="the stored state is of 'other'"):
        estimator.load_state_dict({**estimator.state_dict(), "kind": "other"})
    assert estimator.t == 0 and not estimator.theta_D.any()
    before = estimator.theta_D
    estimator.step(torch.zeros(1, 3))  # a zero difference teaches nothing
    assert torch.equal(estimator.theta_D, before)
    with pytest.raises(UsageError, match="at least one feature"):
        MAKERS[name](0)
    with pytest.raises(UsageError, match=r"theta has shape \(2,\)"):
        Omd(3, theta_D=torch.zeros(2))
