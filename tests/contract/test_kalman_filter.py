"""The filter of Kalman normalisation against its sheet's equations, in float64."""

import pytest
import torch

from normlab.norms.kalman_filter import (
    Posterior,
    add_moments,
    guard,
    kalman_update,
    observe,
    predict,
)


def posterior(channels, *, full=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(channels, generator=generator, dtype=torch.float64)
    root = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    covariance = root @ root.T
    return Posterior(mean, covariance if full else covariance.diagonal().clone())


def test_the_sheets_scalar_case():
    prior = Posterior(torch.tensor([1.0]), torch.tensor([2.0]))
    batch = Posterior(torch.tensor([3.0]), torch.tensor([5.0]))
    mean, variance = kalman_update(prior, batch, 0.25)
    assert (mean.item(), variance.item()) == (1.5, 3.5)


@pytest.mark.parametrize("full", [False, True])
def test_half_and_half_are_the_moments_of_the_pooled_data(full):
    one, two = (torch.randn(9, 3, dtype=torch.float64) * scale + scale for scale in (1, 2))
    mean, covariance = kalman_update(observe(one, full=full), observe(two, full=full), 0.5)
    pooled = torch.cat([one, two])
    expected = pooled.T.cov(correction=0)
    torch.testing.assert_close(mean, pooled.mean(0))
    torch.testing.assert_close(covariance, expected if full else expected.diagonal())


@pytest.mark.parametrize("gain", [0.3, 0.8])
@pytest.mark.parametrize("full", [False, True])
def test_the_update_is_the_covariance_of_a_mixture(full, gain):
    prior, batch = posterior(4, full=full), posterior(4, full=full, seed=1)
    mean, covariance = kalman_update(prior, batch, gain)
    expected_mean = gain * batch.mean + (1 - gain) * prior.mean
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for share, one in ((gain, batch), (1 - gain, prior)):
        own = one.covariance if full else torch.diag(one.covariance)
        expected += share * (own + torch.outer(one.mean, one.mean))
    expected -= torch.outer(expected_mean, expected_mean)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(covariance, expected if full else expected.diagonal())


def test_the_ends_of_the_gain_are_exact():
    prior, batch = posterior(4), posterior(4, seed=1)
    for gain, expected in ((0.0, prior), (1.0, batch)):
        for one, two in zip(kalman_update(prior, batch, gain), expected, strict=True):
            assert torch.equal(one, two)


def test_disagreement_of_the_means_adds_variance():
    prior, batch = posterior(4), posterior(4, seed=1)
    between = 0.3 * batch.variance + 0.7 * prior.variance
    assert (kalman_update(prior, batch, 0.3).variance > between).all()
    agreeing = Posterior(batch.mean, prior.covariance)
    torch.testing.assert_close(kalman_update(agreeing, batch, 0.3).variance, between)


def test_a_full_covariance_stays_positive_semidefinite():
    prior = posterior(5, full=True)
    batch = observe(torch.randn(2, 5, dtype=torch.float64), full=True)  # of rank 1
    matrix = torch.randn(5, 5, dtype=torch.float64)
    prediction = predict(prior, matrix, torch.full((5,), 1e-2).double(), full=True)
    covariance = kalman_update(prediction, batch, 0.4).covariance
    torch.testing.assert_close(covariance, covariance.T)
    assert torch.linalg.eigvalsh(covariance).min() > 0


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("full_prior", [False, True])
def test_prediction_equals_the_dense_product(full, full_prior):
    prior = posterior(3, full=full_prior)
    matrix, noise = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    before = prior.covariance if full_prior else torch.diag(prior.covariance)
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for i in range(5):
        for j in range(5):
            terms = [matrix[i, a] * before[a, b] * matrix[j, b] for a in range(3) for b in range(3)]
            expected[i, j] = sum(terms) + (noise[i] if i == j else 0)
    mean, covariance = predict(prior, matrix, noise, full=full)
    torch.testing.assert_close(mean, (matrix * prior.mean).sum(1))
    torch.testing.assert_close(covariance, expected if full else expected.diagonal())


@pytest.mark.parametrize("gain", [0.0, 0.3, 1.0])
def test_a_perfect_prediction_changes_nothing(gain):
    batch = observe(torch.randn(6, 4, 3, dtype=torch.float64))
    eye, rho = torch.eye(4).double(), torch.full((4,), -800.0).double()
    prediction = predict(batch, eye, torch.nn.functional.softplus(rho))
    torch.testing.assert_close(kalman_update(prediction, batch, gain), batch)


def test_the_full_observation_equals_torchs_covariance():
    x = torch.randn(4, 3, 2, 5, dtype=torch.float64) + 2
    mean, covariance = observe(x, full=True)
    rows = x.transpose(0, 1).reshape(3, -1)
    torch.testing.assert_close(mean, rows.mean(1))
    torch.testing.assert_close(covariance, rows.cov(correction=0))
    torch.testing.assert_close(observe(x).variance, Posterior(mean, covariance).variance)


def test_the_guard_gives_exactly_the_batch():
    batch = observe(torch.randn(8, 4, dtype=torch.float64))
    wild = Posterior(batch.mean + 1, 1000 * batch.covariance)
    for gain in (0.1, 0.9):
        kept = kalman_update(guard(wild, batch, 100, 1e-5), batch, gain)
        assert torch.equal(kept.mean, batch.mean)
        assert torch.equal(kept.covariance, batch.covariance)
    assert guard(wild, batch, 1001, 1e-5).mean.equal(wild.mean)


def test_the_guard_counts_the_mean_ratio_with_eps():
    batch = Posterior(torch.zeros(2), torch.tensor([1.0, 3.0]))
    prediction = Posterior(torch.ones(2), torch.tensor([30.0, 40.0]))  # ratios 15 and 10
    assert guard(prediction, batch, 12.6, 1.0).mean.equal(prediction.mean)
    assert guard(prediction, batch, 12.5, 1.0).mean.equal(batch.mean)


def test_a_discarded_prediction_gets_no_gradient():
    batch = Posterior(torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True))
    wild = Posterior(torch.ones(2, requires_grad=True), torch.full((2,), 1e9).requires_grad_())
    mean, variance = kalman_update(guard(wild, batch, 100, 0.0), batch, 0.25)
    (mean.sum() + variance.sum()).backward()
    assert wild.mean.grad.equal(torch.zeros(2))
    assert wild.covariance.grad.equal(torch.zeros(2))
    assert batch.mean.grad.equal(torch.ones(2))
    assert batch.covariance.grad.equal(torch.ones(2))


def test_sums_add_moments_and_pad_where_told():
    narrow, wide = posterior(2), posterior(5, seed=1)
    mean, variance = add_moments([narrow, wide], [(1, 2), (0, 0)])
    zeros = torch.zeros(5, dtype=torch.float64)
    expected = [zeros.clone(), zeros.clone()]
    for one, own in zip(expected, narrow, strict=True):
        one[1:3] = own
    torch.testing.assert_close(mean, wide.mean + expected[0])
    torch.testing.assert_close(variance, wide.variance + expected[1])


def test_sums_of_full_and_diagonal_covariances_are_full():
    narrow, wide = posterior(2, full=True), posterior(3, seed=1)
    covariance = add_moments([narrow, wide], [(1, 0), (0, 0)]).covariance
    expected = torch.diag(wide.covariance)
    expected[1:, 1:] += narrow.covariance
    torch.testing.assert_close(covariance, expected)


@pytest.mark.parametrize("full", [False, True])
def test_gradients_through_prior_transition_noise_and_gain(full):
    prior = posterior(3, full=full)
    x = torch.randn(4, 2, dtype=torch.float64)
    matrix, rho = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    logit = torch.tensor(0.4, dtype=torch.float64)

    def run(x, mean, covariance, matrix, rho, logit):
        noise = torch.nn.functional.softplus(rho)
        prediction = predict(Posterior(mean, covariance), matrix, noise, full=full)
        return tuple(kalman_update(prediction, observe(x, full=full), logit.sigmoid()))

    inputs = [one.requires_grad_() for one in (x, *prior, matrix, rho, logit)]
    assert torch.autograd.gradcheck(run, inputs)
