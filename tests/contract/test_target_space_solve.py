"""The ridge solve against its normal equations in float64."""

import pytest
import torch

from normlab.weights.target_space_solve import solve_weights


def drawn(num_rows, columns, out=3, batch=(), dtype=torch.float64):
    torch.manual_seed(num_rows * 100 + columns)
    rows = torch.randn(*batch, num_rows, columns, dtype=dtype)
    return rows, torch.randn(*batch, num_rows, out, dtype=dtype)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5)])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_primal_and_dual_form_are_the_ridge_solution(shape, batch):
    rows, targets = drawn(*shape, batch=batch)
    solved = solve_weights(rows, targets, 0.3)
    primal = torch.linalg.inv(rows.mT @ rows + 0.3 * torch.eye(shape[1])) @ rows.mT @ targets
    dual = rows.mT @ torch.linalg.inv(rows @ rows.mT + 0.3 * torch.eye(shape[0])) @ targets
    torch.testing.assert_close(primal, dual)
    torch.testing.assert_close(solved, primal)
    # The gradient of the penalised squares is zero there.
    gradient = rows.mT @ (rows @ solved - targets) + 0.3 * solved
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_zero_ridge_is_the_limit_of_small_ones(shape):
    rows, targets = drawn(*shape)
    limit = solve_weights(rows, targets, 1e-10)
    torch.testing.assert_close(solve_weights(rows, targets, 0.0), limit, atol=1e-7, rtol=1e-7)
    twice = torch.cat([rows, rows], dim=1)  # of deficient rank
    limit = solve_weights(twice, targets, 1e-7)
    torch.testing.assert_close(solve_weights(twice, targets, 0.0), limit, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ridge", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_gradients_are_those_of_finite_differences(shape, ridge):
    rows, targets = (x.requires_grad_() for x in drawn(*shape, out=2))
    assert torch.autograd.gradcheck(lambda a, t: solve_weights(a, t, ridge), (rows, targets))
    if ridge:
        assert torch.autograd.gradgradcheck(
            lambda a, t: solve_weights(a, t, ridge), (rows, targets)
        )


def test_a_system_too_close_to_singular_is_solved_in_float64():
    column = torch.randn(50, 1).exp() * 1000
    rows = torch.cat([column, column, column], dim=1)
    targets = 2 * column
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(rows.mT @ rows + 1e-5 * torch.eye(3))
    solved = solve_weights(rows, targets, 1e-5)
    assert solved.dtype == torch.float32
    torch.testing.assert_close(rows @ solved, targets, atol=1.0, rtol=1e-3)


def test_a_singular_system_is_refused():
    rows = torch.full((4, 3), 1e12, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"solve_weights\(ridge=1e-08\): expected.*; raise ridge"):
        solve_weights(rows, rows, 1e-8)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_gives_weights_that_are_not(shape, ridge, bad):
    rows, targets = drawn(*shape)
    for broken in ((rows * bad, targets), (rows, targets * bad)):
        for tensor in broken:
            tensor.requires_grad_()
        solved = solve_weights(*broken, ridge)
        assert solved.shape == (shape[1], 3)
        assert not torch.isfinite(solved).any()
        solved.sum().backward()
