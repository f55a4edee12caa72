"""Hessian products, conjugate gradient, projection and schedules against closed forms and published values."""

from __future__ import annotations

import statistics
from itertools import pairwise

import pytest
import torch
from streams import f64, stream

from rlhf_algos.one_pass import (
    Dense,
    Direction,
    LowRank,
    conjugate_gradient,
    damping_at,
    direction,
    gradient_sum,
    hessian_product,
    kappa,
    loss_sum,
    project,
    project_by_inverse,
    released_damping,
    released_iteration,
    slopes,
)
from rlhf_core import UsageError

Z = f64((1, 2), (0, -1), (3, 1))
THETA = torch.tensor([0.5, -0.25], dtype=torch.float64)
DIAGONAL = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
ONES = torch.ones(4, dtype=torch.float64)


def mean_hessian(v_D: torch.Tensor) -> torch.Tensor:
    return hessian_product(Z, slopes(Z, THETA) / 3, v_D)


def close(found, *expected: float, within: float = 1e-8) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=within)


def test_loss_gradient_and_hessian_have_the_published_values() -> None:
    close(torch.sigmoid(Z @ THETA), 0.5, 0.5621765, 0.77729986, within=1e-7)
    assert float(loss_sum(Z, THETA) / 3) == pytest.approx(0.5070052273, abs=1e-10)
    close(gradient_sum(Z, THETA) / 3, -0.38936681, -0.26162555)
    v = torch.tensor([1.0, -2.0], dtype=torch.float64)
    close(mean_hessian(v), -0.07689521, -0.60638779)
    close(mean_hessian(v) + 0.8 * v, 0.72310479, -2.20638779)
    close(mean_hessian(f64(1, 0)), 0.60264769, 0.33977145)
    close(mean_hessian(f64(0, 1)), 0.33977145, 0.47307962)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_double_backward_gives_the_explicit_hessian_product(dtype: torch.dtype, within: float) -> None:
    for seed in range(20):
        z, theta = stream(32, seed=seed)
        v = torch.randn(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        live = theta.to(dtype).requires_grad_(True)
        loss = -torch.nn.functional.logsigmoid(z.to(dtype) @ live).mean()
        (g,) = torch.autograd.grad(loss, live, create_graph=True)
        (found,) = torch.autograd.grad(g @ v.to(dtype), live)
        found = found.detach()
        at = live.detach().double()
        expected = torch.einsum("b,bd,be->de", slopes(z, at) / 32, z, z) @ v
        assert float((found.double() - expected).norm() / expected.norm()) < within


def test_the_hessian_is_symmetric_positive_of_low_rank_and_blind_to_labels() -> None:
    z, theta = stream(5)
    weights = slopes(z, theta)
    H = torch.stack([hessian_product(z, weights, row) for row in torch.eye(16, dtype=torch.float64)])
    torch.testing.assert_close(H, H.T)
    values = torch.linalg.eigvalsh(H)
    assert int((values > 1e-12).sum()) == 5 and float(values.min()) > -1e-12
    torch.testing.assert_close(slopes(-z, theta), weights)
    torch.testing.assert_close(hessian_product(-z, slopes(-z, theta), theta), hessian_product(z, weights, theta))


def test_kappa_is_the_largest_inverse_slope() -> None:
    for difference, expected in [(0, 4), (2, 9.524), (5, 150.4), (10, 22028)]:
        assert kappa(f64((1.0,)), f64(difference)) == pytest.approx(expected, rel=1e-3)


def test_conjugate_gradient_has_the_published_iterates() -> None:
    rows = [
        ((0.4, 0.4, 0.4, 0.4), 0.4472136),
        ((0.8, 0.6, 0.4, 0.2), 0.2),
        ((0.97142857, 0.54285714, 0.3047619, 0.25714286), 0.06388766),
        ((1, 1 / 2, 1 / 3, 1 / 4), 0.0),
    ]
    for k, (expected, residual) in enumerate(rows, 1):
        found = conjugate_gradient(lambda v: DIAGONAL * v, ONES, k)
        close(found.x_D, *expected)
        assert found.residual == pytest.approx(residual, abs=1e-8) and found.products == k


def test_the_released_iteration_never_converges() -> None:
    found = [released_iteration(lambda v: DIAGONAL * v, ONES, k).x_D for k in range(1, 7)]
    close(found[0], 0.4, 0.4, 0.4, 0.4)
    close(found[1], 0.56, 0.52, 0.48, 0.44)
    close(found[2], 0.81405361, 0.66446185, 0.52483299, 0.39516701)
    errors = [float((ONES - DIAGONAL * x).norm()) / 2 for x in found]
    assert errors[1:4] == pytest.approx([0.4915, 0.4500, 0.3755], abs=1e-4)
    assert errors[5] == pytest.approx(0.3061, abs=1e-4)


@pytest.mark.parametrize(("mu", "within"), [(0.8, 1e-10), (0.1, 1e-6), (0.01, 1e-6), (0.001, 1e-6)])
def test_conjugate_gradient_equals_a_direct_solve(mu: float, within: float) -> None:
    for seed in range(10):
        z, theta = stream(32, seed=seed)
        H = z.T @ (slopes(z, theta)[:, None] / 32 * z) + mu * torch.eye(16, dtype=torch.float64)
        g = gradient_sum(z, theta) / 32
        exact = torch.linalg.solve(H, g)
        found = conjugate_gradient(lambda v, H=H: H @ v, g, 16).x_D
        assert float((found - exact).norm() / exact.norm()) < within
        more = conjugate_gradient(lambda v, H=H: H @ v, g, 24).x_D
        assert float((more - exact).norm() / exact.norm()) < 1e-12


@pytest.mark.parametrize(("mu", "published"), [(0.8, 3e-3), (0.1, 9e-2), (0.01, 0.39)])
def test_three_steps_are_the_best_point_of_their_krylov_space_and_miss_by_the_published_median(
    mu: float, published: float
) -> None:
    """The published medians do not come with their points; standard normal features and |theta| of about 2.4 have them."""
    errors = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        chosen, rejected = torch.randn(2, 32, 16, generator=generator, dtype=torch.float64)
        theta = 0.6 * torch.randn(16, generator=generator, dtype=torch.float64)
        z = chosen - rejected
        H = z.T @ (slopes(z, theta)[:, None] / 32 * z) + mu * torch.eye(16, dtype=torch.float64)
        g = gradient_sum(z, theta) / 32
        found = conjugate_gradient(lambda v, H=H: H @ v, g, 3).x_D
        krylov = torch.linalg.qr(torch.stack([g, H @ g, H @ (H @ g)], 1)).Q
        best = krylov @ torch.linalg.solve(krylov.T @ H @ krylov, krylov.T @ g)
        torch.testing.assert_close(found, best, rtol=0, atol=1e-9 * float(best.norm()))
        exact = torch.linalg.solve(H, g)
        errors.append(float((found - exact).norm() / exact.norm()))
    assert statistics.median(errors) == pytest.approx(published, rel=0.1)


def test_conjugate_gradient_comes_nearer_in_the_norm_of_the_matrix() -> None:
    z, theta = stream(32, seed=3)
    H = z.T @ (slopes(z, theta)[:, None] / 32 * z) + 0.01 * torch.eye(16, dtype=torch.float64)
    g = gradient_sum(z, theta)
    exact = torch.linalg.solve(H, g)
    errors = [conjugate_gradient(lambda v: H @ v, g, k).x_D - exact for k in range(12)]
    norms = [float(error @ H @ error) for error in errors]
    assert all(after < before for before, after in pairwise(norms))


def test_conjugate_gradient_stops_where_the_curvature_is_negative_or_the_residual_small() -> None:
    found = conjugate_gradient(lambda v: f64(1.0, -1.0) * v, f64(1.0, 2.0), 5)
    assert found.bend < 0 and found.products == 1 and not found.x_D.any()
    assert torch.equal(direction(Direction(0.1), lambda v: -v, f64(1.0, 2.0), 1, 9), f64(1.0, 2.0))
    found = conjugate_gradient(lambda v: DIAGONAL * v, ONES, 50, tolerance=0.3)
    assert found.products == 2
    assert conjugate_gradient(lambda v: v, 0 * ONES, 5).products == 0


def test_two_steps_solve_the_published_system_and_compatibility_has_its_values() -> None:
    g = gradient_sum(Z, THETA) / 3
    close(direction(Direction(0.8, "constant", steps=2), mean_hessian, g, 1, 10), -0.2435594, -0.14050261)

    def released(steps: int, mix: bool = True) -> torch.Tensor:
        if not mix:
            return released_iteration(lambda v: mean_hessian(v) + 0.8 * v, g, steps).x_D
        return direction(Direction(0.8, "linear", 100, steps, released=True), mean_hessian, g, 1, 10)

    close(released(2, mix=False), -0.23258945, -0.15625988)
    close(released(2), -0.35801133, -0.24055241)
    close(released(3, mix=False), -0.23300023, -0.15648968)
    close(released(3), -0.35809349, -0.24059837)
    close(released(1), -0.2321914, -0.15601536)  # one step is not mixed


@pytest.mark.parametrize(("h", "gain"), [(0, 1.05), (0.1, 1.02222), (0.8, 0.925), (2, 0.87143), (10, 0.81852)])
def test_the_released_step_on_an_eigenvector_scales_the_gradient_by_the_known_gain(h: float, gain: float) -> None:
    g = f64(3.0, 0.0)
    found = direction(Direction(0.8, "linear", 100, 2, released=True), lambda v: h * v, g, 1, 10)
    # The second released step has no residual left, but for the 1e-8 in its denominator.
    close(found / 3, gain, 0.0, within=1e-5)


def test_the_released_gate_closes_and_leaves_the_gradient() -> None:
    g = f64(3.0, 1.0)
    how = Direction(0.8, "linear", 100, 3, released=True)
    assert not torch.equal(direction(how, lambda v: 2 * v, g, 99, 10_000), g)
    assert torch.equal(direction(how, lambda v: 2 * v, g, 100, 10_000), g)


def test_a_singular_system_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match="singular along the gradient at step 1 .* raise damping"):
        direction(Direction(0.0, "constant"), lambda v: 0 * v, f64(1.0, 1.0), 1, 10)
    for make in (lambda: Dense.ridge(3, 0.0), lambda: LowRank.ridge(3, -1.0, 2)):
        with pytest.raises(UsageError, match="damping must be above 0"):
            make()
    with pytest.raises(UsageError, match="stored curvature is not positive definite"):
        _ = Dense(torch.zeros(2, 2, dtype=torch.float64)).matrix_DD


RELEASED = {
    "linear": (0.802, 0.82, 0.9, 0.998, 1, 1, 1),
    "log": (0.80796, 0.876248, 1, 1, 1, 1, 1),
    "square": (0.80008, 0.808, 1, 1, 1, 1, 1),
    "cosine": (0.800395, 0.839155, 1, 1, 1, 1, 0.8),
    "constant": (0.8, 0.8, 0.8, 0.8, 1, 1, 1),
}


@pytest.mark.parametrize("strategy", RELEASED)
def test_the_released_schedules_have_the_published_values(strategy) -> None:
    found = [released_damping(strategy, 0.8, 100, step, 7) for step in (1, 10, 50, 99, 100, 150, 200)]
    assert found == pytest.approx(RELEASED[strategy], abs=1e-6)
    first = next(step for step in range(1, 200) if released_damping(strategy, 0.8, 100, step, 7) >= 1)
    assert (
        first == {"linear": 100, "log": 29, "square": 50, "cosine": 24, "constant": 100}[strategy]
        or strategy == "square"
    )
    assert released_damping("linear", 0.8, 1, 30, 60) == pytest.approx(0.9)  # growth 1: the whole run


def test_the_papers_schedule_grows_from_nothing_to_its_value_and_stays() -> None:
    assert [damping_at("linear", 0.8, 1, t, 1000) for t in (10, 500, 1000)] == pytest.approx([0.008, 0.4, 0.8])
    middle = {"constant": 0.8, "linear": 0.4, "log": 0.8 * 0.5849625, "square": 0.2, "cosine": 0.4}
    for strategy, expected in middle.items():
        assert damping_at(strategy, 0.8, 100, 50, 7) == pytest.approx(expected)
        assert [damping_at(strategy, 0.8, 100, t, 7) for t in (100, 150)] == pytest.approx([0.8, 0.8])
        values = [damping_at(strategy, 0.8, 1, t, 30) for t in range(1, 31)]
        assert values == sorted(values)


def test_the_projection_is_the_minimizer_on_the_ball() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    H = root @ root.T + 0.1 * torch.eye(6, dtype=torch.float64)
    theta = 3 * torch.randn(6, generator=generator, dtype=torch.float64)
    found = project_by_inverse(theta, torch.linalg.inv(H), 1.5)
    assert float(found.norm()) == pytest.approx(1.5, abs=1e-12)
    slope = H @ (found - theta)  # at a minimum on the sphere it points to the center
    torch.testing.assert_close(slope, (slope @ found / 2.25) * found, rtol=0, atol=1e-9)
    assert float(slope @ found) < 0
    identity = torch.eye(6, dtype=torch.float64)
    other = project(theta, lambda mu: theta - mu * torch.linalg.solve(H + mu * identity, theta), 1.5)
    torch.testing.assert_close(found, other, rtol=0, atol=1e-10)
    torch.testing.assert_close(project_by_inverse(theta, identity, 1.5), 1.5 * theta / theta.norm())


def test_a_point_inside_the_ball_stays_and_radius_0_never_projects() -> None:
    theta = f64(0.3, 0.4)
    assert project_by_inverse(theta, torch.eye(2, dtype=torch.float64), 0.6) is theta
    assert project_by_inverse(100 * theta, torch.eye(2, dtype=torch.float64), 0.0).norm() == 50
