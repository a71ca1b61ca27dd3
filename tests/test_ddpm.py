"""rng/ddpm.py by brute force: Eq. 1 iterated, the Gaussian posterior on a grid, exact noise predictors."""

import math

import numpy as np
import pytest
import torch

from rng import ddpm


def generator(seed):
    return np.random.default_rng(seed)


def random_schedule(gen, T):
    """Any schedule, not only a linear one, so that no formula holds by accident."""
    alpha = np.concatenate([[1.0], gen.uniform(0.4, 0.999, T)])
    sigma = np.sqrt(1 - alpha)
    sigma[1] = 0
    return ddpm.Schedule(alpha, np.cumprod(alpha), sigma)


def scalar(value):
    return torch.full((1, 1, 1, 1), float(value))


def random_images(gen, *shape):
    return torch.tensor(gen.normal(size=shape), dtype=torch.float32)


def column(gamma):
    return gamma[:, None, None, None]


# Schedules


@pytest.mark.parametrize("seed", range(30))
def test_linear_schedule(seed):
    gen = generator(seed)
    T, end = int(gen.integers(2, 200)), gen.uniform(1e-5, 0.5)
    alpha, gamma, sigma = ddpm.linear_schedule(T, end)
    beta = 1 - alpha[1:]
    for table in (alpha, gamma, sigma):
        assert table.shape == (T + 1,) and table.dtype == np.float64
    assert beta[0] == pytest.approx(1e-6, rel=1e-9) and beta[-1] == pytest.approx(end, rel=1e-9)
    assert np.allclose(np.diff(beta), (end - 1e-6) / (T - 1), rtol=1e-6, atol=1e-15)
    assert gamma[0] == 1
    assert np.allclose(gamma[1:], [np.prod(alpha[1:t + 1]) for t in range(1, T + 1)], rtol=1e-9, atol=0)
    assert (np.diff(gamma) < 0).all() and (gamma > 0).all()
    assert sigma[1] == 0 and np.allclose(sigma[2:] ** 2, beta[1:], rtol=1e-9)  # the paper's, by default


@pytest.mark.parametrize("variance", ddpm.VARIANCES)
def test_linear_schedule_of_one_step_is_the_end_point(variance):
    assert np.allclose(ddpm.linear_schedule(1, 0.3, variance)[:2], [[1, 0.7], [1, 0.7]])


@pytest.mark.parametrize("arguments", [
    (0, 0.5), (-3, 0.5), (9, 1.0), (9, 2.0), (9, 0.0), (9, -0.1), (9, math.nan), (9, 0.5, "learned")])
def test_linear_schedule_refuses(arguments):
    with pytest.raises(ValueError):
        ddpm.linear_schedule(*arguments)


@pytest.mark.parametrize("T, end", [(1, 0.5), (10, 0.5), (40, 0.5), (50, 0.4), (76, 20 / 76), (2000, 0.01)])
def test_default_end(T, end):
    assert ddpm.default_end(T) == pytest.approx(end)


# Eq. 1, forward


@pytest.mark.parametrize("seed", range(20))
def test_q_sample_is_eq_1_iterated(seed):
    gen = generator(seed)
    schedule = random_schedule(gen, int(gen.integers(1, 60)))
    gamma = torch.tensor(schedule.gamma[1:])
    one, zero = torch.ones(len(gamma), 3, 1, 1), torch.zeros(len(gamma), 3, 1, 1)
    mean, variance = [1.0], [0.0]
    for alpha in schedule.alpha[1:]:
        mean.append(math.sqrt(alpha) * mean[-1])
        variance.append(alpha * variance[-1] + 1 - alpha)
    assert np.allclose(ddpm.q_sample(one, gamma, zero)[:, 0, 0, 0], mean[1:], rtol=1e-6)
    assert np.allclose(ddpm.q_sample(zero, gamma, one)[:, 0, 0, 0] ** 2, variance[1:], rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_q_sample_has_the_distribution_of_eq_1_iterated(seed):
    gen, n = generator(seed), 40000
    schedule = random_schedule(gen, 8)
    d_0 = gen.normal(scale=2)
    d_t = np.full(n, d_0)
    for alpha in schedule.alpha[1:]:
        d_t = math.sqrt(alpha) * d_t + math.sqrt(1 - alpha) * gen.normal(size=n)
    eps = random_images(gen, 1, 1, 1, n)
    closed = ddpm.q_sample(scalar(d_0), torch.tensor(schedule.gamma[-1:]), eps).numpy()
    assert closed.mean() == pytest.approx(d_t.mean(), abs=5 / math.sqrt(n))  # five standard errors
    assert closed.std() == pytest.approx(d_t.std(), rel=5 / math.sqrt(n))


def test_q_sample_keeps_the_first_step_of_the_paper():
    gamma = torch.tensor(ddpm.linear_schedule(2000, 0.01).gamma[1:2])  # 1 - 1e-6, which float32 misses by 1 %
    assert ddpm.q_sample(scalar(0), gamma, scalar(1)).item() == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_estimate_and_noise_in_invert_q_sample(seed):
    gen = generator(seed)
    d_0, eps = random_images(gen, 5, 3, 4, 6), random_images(gen, 5, 3, 4, 6)
    gamma = torch.tensor(gen.uniform(0.01, 1, 5))
    assert torch.allclose(ddpm.estimate(ddpm.q_sample(d_0, gamma, eps), eps, gamma), d_0, atol=1e-4)
    assert torch.allclose(ddpm.noise_in(ddpm.q_sample(d_0, gamma, eps), d_0, gamma), eps, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_draw_gamma_is_uniform_over_the_steps_and_within_each(seed):
    gen, T, n = generator(seed), 12, 6000
    schedule = random_schedule(gen, T)
    draws = np.array([ddpm.draw_gamma(schedule, gen) for _ in range(n)])
    assert (draws <= 1).all() and (draws >= schedule.gamma[-1]).all()
    t = T + 1 - np.searchsorted(schedule.gamma[::-1], draws, side="right").clip(1, T)  # gamma_t <= draw
    chi2 = ((np.bincount(t, minlength=T + 1)[1:] - n / T) ** 2 / (n / T)).sum()
    assert chi2 < 45  # 11 degrees of freedom: the chance is below 1e-5
    place = np.sort((draws - schedule.gamma[t]) / (schedule.gamma[t - 1] - schedule.gamma[t]))
    assert np.abs(place - (np.arange(n) + 0.5) / n).max() < 2.5 / math.sqrt(n)  # Kolmogorov and Smirnov


# Eqs. 2 and 5, the loss


@pytest.mark.parametrize("p", [(), (1,), (2,)])  # 1, the paper's, by default
@pytest.mark.parametrize("seed", range(4))
def test_loss(seed, p):
    gen = generator(seed)
    x, d_0, eps = (random_images(gen, 5, 3, 4, 6) for _ in range(3))
    gamma, seen = torch.tensor(gen.uniform(0.01, 1, 5)), []

    def g(*arguments):
        seen.append(arguments)
        return (0.3 * arguments[0] - arguments[1]).bfloat16()

    d_t = np.sqrt(column(gamma.numpy())) * d_0.numpy() + np.sqrt(1 - column(gamma.numpy())) * eps.numpy()
    predicted = torch.tensor(0.3 * x.numpy() - d_t).bfloat16().double().numpy()
    value = ddpm.loss(g, x, d_0, gamma, eps, *p)
    assert value.item() == pytest.approx((np.abs(eps.numpy() - predicted) ** (*p, 1)[0]).mean(), rel=1e-3)
    assert value.dtype == torch.float32 and len(seen) == 1
    assert seen[0][0] is x and np.allclose(seen[0][1], d_t, atol=1e-6) and seen[0][2].dtype == torch.float64


# Eq. 3, one inverse step


@pytest.mark.parametrize("kind", ["any", "posterior"])
@pytest.mark.parametrize("seed", range(15))
def test_step_is_the_gaussian_posterior(seed, kind):
    gen = generator(seed)
    T = int(gen.integers(2, 30))
    t = int(gen.integers(2, T + 1))
    linear = ddpm.linear_schedule(T, gen.uniform(0.1, 0.6), "posterior")
    schedule = linear if kind == "posterior" else random_schedule(gen, T)
    alpha, gamma, gamma_prev = schedule.alpha[t], schedule.gamma[t], schedule.gamma[t - 1]
    d_0 = gen.normal()
    d_t = math.sqrt(gamma) * d_0 + math.sqrt(1 - gamma) * gen.normal()
    # q(d_(t-1) | d_t, d_0) is q(d_t | d_(t-1)) q(d_(t-1) | d_0), normalised
    d_prev = np.linspace(-12, 12, 200001)
    q = np.exp(-(d_t - math.sqrt(alpha) * d_prev) ** 2 / (2 * (1 - alpha))
               - (d_prev - math.sqrt(gamma_prev) * d_0) ** 2 / (2 * (1 - gamma_prev)))
    q /= q.sum()
    mean = (q * d_prev).sum()
    variance = (q * (d_prev - mean) ** 2).sum() if kind == "posterior" else 1 - alpha
    eps = scalar((d_t - math.sqrt(gamma) * d_0) / math.sqrt(1 - gamma))
    still, moved = (ddpm.step(scalar(d_t), eps, t, schedule, scalar(z)).item() for z in (0, 1))
    assert still == pytest.approx(mean, abs=1e-5)
    assert moved - still == pytest.approx(math.sqrt(variance), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("variance", ddpm.VARIANCES)
@pytest.mark.parametrize("seed", range(5))
def test_step_adds_no_noise_at_t_1(seed, variance):
    gen = generator(seed)
    schedule = ddpm.linear_schedule(seed + 1, gen.uniform(0.01, 0.9), variance)
    d_0, d_1 = gen.normal(size=2)
    eps = scalar((d_1 - math.sqrt(schedule.gamma[1]) * d_0) / math.sqrt(1 - schedule.gamma[1]))
    assert ddpm.step(scalar(d_1), eps, 1, schedule, scalar(100)).item() == pytest.approx(d_0, abs=1e-5)


# Algorithm 1, the sampler


def exact_predictor(m, s):
    """The best noise prediction E[eps | d_t] for data N(m, s^2)."""
    def g(x, d_t, gamma):
        a = column(gamma)
        return (1 - a).sqrt() * (d_t - a.sqrt() * m) / (a * s ** 2 + 1 - a)
    return g


def moments(g, T, schedule):
    """Mean and standard deviation of the sampler's output where g is affine in d_t, pixel by pixel.

    Then the output is affine in the noise: pixel k sees the noise of key k as a unit impulse and gives its
    factor, and pixels beyond T, which see none, give the mean. No sampling error.
    """
    side = math.ceil(math.sqrt((T + 2) / 3))

    def impulse(key):
        return torch.eye(3 * side ** 2)[key].view(1, 3, side, side)

    d_0 = ddpm.sample(g, torch.zeros(1, 3, side, side), schedule, impulse).double().flatten()
    return d_0[-1].item(), (d_0 - d_0[-1]).norm().item()


@pytest.mark.parametrize("seed", range(24))
def test_sampler_is_exact_for_gaussian_data_of_unit_variance(seed):
    gen = generator(seed)
    T = int(gen.integers(2, 201)) if seed else 1
    m, schedule = gen.normal(), ddpm.linear_schedule(T, gen.uniform(0.01, 0.9))
    mean, std = moments(exact_predictor(m, 1), T, schedule)
    assert mean == pytest.approx(m * (1 - schedule.gamma[T]), abs=1e-4)
    assert std == pytest.approx(1 if T > 1 else math.sqrt(schedule.alpha[1]), abs=1e-4)  # no noise at t = 1


@pytest.mark.parametrize("seed", range(3))
def test_sampler_reproduces_gaussian_data_in_1000_steps(seed):
    gen = generator(seed)
    m, s = gen.normal(), gen.uniform(0.3, 2)
    mean, std = moments(exact_predictor(m, s), 1000, ddpm.linear_schedule(1000, ddpm.default_end(1000)))
    assert std == pytest.approx(s, rel=0.02) and mean == pytest.approx(m, rel=0.05)


def test_sampler_draws_what_its_moments_say():
    torch_generator = torch.Generator().manual_seed(0)

    def noise(key):
        return torch.randn(2, 3, 100, 100, generator=torch_generator)

    x = torch.zeros(2, 3, 100, 100)
    d_0 = ddpm.sample(exact_predictor(0.7, 1), x, ddpm.linear_schedule(30, 0.5), noise)
    assert d_0.std().item() == pytest.approx(1, abs=0.015)
    assert d_0.mean().item() == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize("variance", ddpm.VARIANCES)
@pytest.mark.parametrize("T", [1, 2, 10, 100])
def test_sampler_with_a_perfect_predictor_of_one_d_0_returns_it(T, variance):
    d_0 = random_images(generator(T), 2, 3, 8, 8)
    schedule = ddpm.linear_schedule(T, ddpm.default_end(T), variance)

    def g(x, d_t, gamma):
        return (d_t - column(gamma).sqrt() * x) / (1 - column(gamma)).sqrt()

    sampled = ddpm.sample(g, d_0, schedule, lambda key: random_images(generator(key), 2, 3, 8, 8))
    assert torch.allclose(sampled, d_0, atol=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_sampler_is_eq_3_repeated_with_one_g_and_one_noise_a_step(seed):
    gen = generator(seed)
    N, T = int(gen.integers(1, 5)), int(gen.integers(1, 10))
    x, schedule, called, drawn = random_images(gen, N, 3, 8, 8), random_schedule(gen, T), [], []

    def g(x, d_t, gamma):
        assert len(x) == len(d_t) == len(gamma) and gamma.dtype == torch.float64
        called.append(gamma.tolist())
        return torch.sin(2 * d_t + x) + column(gamma).float()

    def noise(key):
        drawn.append(key)
        return random_images(generator([key, seed]), N, 3, 8, 8)

    d_0 = ddpm.sample(g, x, schedule, noise)
    assert d_0.shape == x.shape and d_0.dtype == torch.float32
    assert called == [[schedule.gamma[t]] * N for t in range(T, 0, -1)] and drawn == [0, *range(T, 1, -1)]
    d_t = noise(0)
    for t in range(T, 0, -1):
        gamma_t = torch.full((N,), schedule.gamma[t], dtype=torch.float64)
        d_t = ddpm.step(d_t, g(x, d_t, gamma_t), t, schedule, noise(t))
    assert torch.allclose(d_t, d_0, atol=1e-5)
