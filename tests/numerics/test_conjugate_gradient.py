"""The solver against ``torch.linalg.solve`` on matrices that are really positive definite."""

from __future__ import annotations

import pytest
import torch

from torchrl_trpo import conjugate_gradient


def spd(n, size, condition=100.0):
    q = torch.linalg.qr(torch.randn(n, size, size, dtype=torch.float64)).Q
    eigenvalues = torch.logspace(0, torch.tensor(condition).log10(), size, dtype=torch.float64)
    return q @ torch.diag_embed(eigenvalues.expand(n, size)) @ q.mT


def product(matrix):
    return lambda v: (matrix @ v.unsqueeze(-1)).squeeze(-1)


def test_solves_each_system():
    A, b = spd(4, 12), torch.randn(4, 12, dtype=torch.float64)
    result = conjugate_gradient(product(A), b, iterations=30, tol=1e-12)
    torch.testing.assert_close(result.solution, torch.linalg.solve(A, b))
    assert (result.relative_residual <= 1e-11).all()


def test_reports_the_residual_of_an_unfinished_solve():
    A, b = spd(3, 20, condition=1e4), torch.randn(3, 20, dtype=torch.float64)
    result = conjugate_gradient(product(A), b, iterations=4)
    true = b - product(A)(result.solution)
    torch.testing.assert_close(result.residual, true)
    torch.testing.assert_close(result.relative_residual, true.norm(dim=-1) / b.norm(dim=-1))
    assert (result.iterations == 4).all()


def test_a_batch_equals_its_systems_one_by_one():
    """A system that converges early is frozen, to the bit, while the others go on."""
    A, b = spd(3, 10), torch.randn(3, 10, dtype=torch.float64)
    A[1] = torch.eye(10)  # converges in one step
    batch = conjugate_gradient(product(A), b, iterations=8)
    assert batch.iterations.tolist() == [8, 1, 8]
    for i in range(3):
        alone = conjugate_gradient(product(A[i : i + 1]), b[i : i + 1], iterations=8)
        torch.testing.assert_close(batch.solution[i], alone.solution[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e6])
def test_stopping_is_relative(scale):
    """HARL stops on an absolute residual, so small gradients get the plain gradient as direction."""
    A, b = spd(1, 10), torch.randn(1, 10, dtype=torch.float64)
    result = conjugate_gradient(product(A), scale * b, iterations=20, tol=1e-10)
    torch.testing.assert_close(result.solution / scale, torch.linalg.solve(A, b))


def test_the_scalar_product_from_the_residual():
    """xᵀAx = xᵀ(b − r) needs no further product, converged or not."""
    A, b = spd(2, 15), torch.randn(2, 15, dtype=torch.float64)
    x, r, *_ = conjugate_gradient(product(A), b, iterations=5)
    torch.testing.assert_close((x * (b - r)).sum(-1), (x * product(A)(x)).sum(-1))


def test_nan_shows_in_the_residual_of_its_system_alone():
    A, b = spd(3, 6), torch.randn(3, 6, dtype=torch.float64)
    A[1, 2, 2] = torch.nan
    result = conjugate_gradient(product(A), b, iterations=10)
    assert result.relative_residual.isnan().tolist() == [False, True, False]


def test_zero_right_hand_side_has_the_zero_solution():
    result = conjugate_gradient(product(spd(1, 5)), torch.zeros(1, 5, dtype=torch.float64))
    assert (result.solution == 0).all()
    assert result.relative_residual.item() == 0
    assert result.iterations.item() == 0


def test_a_direction_without_positive_curvature_is_not_followed():
    """The step to the minimum along it would be backwards, or infinite; what was found before it stays."""
    A = torch.diag_embed(torch.tensor([[-1.0, -2.0], [1.0, -1.0], [2.0, -1.0]], dtype=torch.float64))
    b = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.5]], dtype=torch.float64)
    result = conjugate_gradient(product(A), b)
    assert result.iterations.tolist() == [0, 0, 1]
    assert (result.solution[:2] == 0).all()
    torch.testing.assert_close(result.solution[2], b[2] * 1.25 / 1.75)  # of the first direction, b itself
    torch.testing.assert_close(result.residual, b - product(A)(result.solution))


@pytest.mark.parametrize(
    ("b", "keywords", "message"),
    [
        (torch.zeros(3), {}, r"\[n, P\].*\(3,\)"),
        (torch.zeros(1, 3), {"iterations": 0}, "iterations.*0"),
        (torch.zeros(1, 3), {"tol": -1.0}, "tol.*-1"),
    ],
)
def test_bad_input(b, keywords, message):
    with pytest.raises(ValueError, match=message):
        conjugate_gradient(lambda v: v, b, **keywords)


def test_meta_device():
    """No hidden host wait and no CPU tensor: a meta tensor refuses both."""
    result = conjugate_gradient(lambda v: 2 * v, torch.randn(4, 7, device="meta"))
    assert result.solution.device.type == "meta"
    assert result.relative_residual.shape == (4,)
