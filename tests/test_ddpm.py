"""rng/ddpm.py against brute force: Eq. 1 iterated, the Gaussian posterior on a grid, exact noise predictors."""

import math

import numpy as np
import pytest
import torch

from rng import ddpm


def generator(seed):
    return np.random.default_rng(seed)


def random_schedule(gen, steps):
    """Any schedule, not only a linear one, so that no formula holds by accident."""
    alpha = np.concatenate([[1.0], gen.uniform(0.4, 0.999, steps)])
    return ddpm.Schedule(alpha, np.cumprod(alpha))


def scalar(value):
    return torch.full((1, 1, 1, 1), float(value))


# Schedules


@pytest.mark.parametrize("seed", range(30))
def test_linear_schedule(seed):
    gen = generator(seed)
    steps, end = int(gen.integers(2, 200)), gen.uniform(1e-5, 0.5)
    alpha, gamma = ddpm.linear_schedule(steps, end)
    beta = 1 - alpha[1:]
    assert alpha.shape == gamma.shape == (steps + 1,) and alpha.dtype == gamma.dtype == np.float64
    assert beta[0] == pytest.approx(1e-6, rel=1e-9) and beta[-1] == pytest.approx(end, rel=1e-9)
    assert np.allclose(np.diff(beta), (end - 1e-6) / (steps - 1), rtol=1e-6, atol=1e-15)
    assert gamma[0] == 1
    assert np.allclose(gamma[1:], [np.prod(alpha[1:t + 1]) for t in range(1, steps + 1)], rtol=1e-9, atol=0)
    assert (np.diff(gamma) < 0).all() and (gamma > 0).all()


def test_linear_schedule_of_one_step_is_the_end_point():
    alpha, gamma = ddpm.linear_schedule(1, 0.3)
    assert np.allclose(alpha, [1, 0.7]) and np.allclose(gamma, [1, 0.7])


@pytest.mark.parametrize("steps, end", [(0, 0.5), (-3, 0.5), (9, 1.0), (9, 2.0), (9, 0.0), (9, -0.1), (9, math.nan)])
def test_linear_schedule_refuses(steps, end):
    with pytest.raises(ValueError):
        ddpm.linear_schedule(steps, end)


@pytest.mark.parametrize("steps, end", [(1, 0.5), (10, 0.5), (20, 0.5), (50, 0.2), (76, 10 / 76), (2000, 0.005)])
def test_default_end(steps, end):
    assert ddpm.default_end(steps) == pytest.approx(end)


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
    eps = torch.tensor(gen.normal(size=(1, 1, 1, n)), dtype=torch.float32)
    closed = ddpm.q_sample(scalar(d_0), torch.tensor(schedule.gamma[-1:]), eps).numpy()
    assert closed.mean() == pytest.approx(d_t.mean(), abs=5 / math.sqrt(n))  # five standard errors
    assert closed.std() == pytest.approx(d_t.std(), rel=5 / math.sqrt(n))


def test_q_sample_keeps_the_first_step_of_the_paper():
    gamma = torch.tensor(ddpm.linear_schedule(2000, 0.01).gamma[1:2])  # 1 - 1e-6, which float32 misses by 1 %
    assert ddpm.q_sample(scalar(0), gamma, scalar(1)).item() == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_draw_gamma_is_uniform_over_the_steps_and_within_each(seed):
    gen, T, n = generator(seed), 12, 6000
    schedule = random_schedule(gen, T)
    draws = np.array([ddpm.draw_gamma(schedule, gen) for _ in range(n)])
    assert (draws <= 1).all() and (draws >= schedule.gamma[-1]).all()
    t = T + 1 - np.searchsorted(schedule.gamma[::-1], draws, side="right").clip(1, T)  # gamma_t <= draw < gamma_(t-1)
    chi2 = ((np.bincount(t, minlength=T + 1)[1:] - n / T) ** 2 / (n / T)).sum()
    assert chi2 < 45  # 11 degrees of freedom: the chance is below 1e-5
    place = np.sort((draws - schedule.gamma[t]) / (schedule.gamma[t - 1] - schedule.gamma[t]))
    assert np.abs(place - (np.arange(n) + 0.5) / n).max() < 2.5 / math.sqrt(n)  # Kolmogorov and Smirnov


# Eqs. 2 and 5, the loss


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_loss(seed, p):
    gen = generator(seed)
    x, d_0, eps = (torch.tensor(gen.normal(size=(5, 3, 4, 6)), dtype=torch.float32) for _ in range(3))
    gamma = torch.tensor(gen.uniform(0.01, 1, 5))
    seen = []

    def g(*arguments):
        seen.append(arguments)
        return (0.3 * arguments[0] - arguments[1]).bfloat16()

    a = gamma.numpy()[:, None, None, None]
    d_t = np.sqrt(a) * d_0.numpy() + np.sqrt(1 - a) * eps.numpy()
    predicted = torch.tensor(0.3 * x.numpy() - d_t).bfloat16().double().numpy()
    value = ddpm.loss(g, x, d_0, gamma, eps, p)
    assert value.item() == pytest.approx((np.abs(eps.numpy() - predicted) ** p).mean(), rel=1e-3)
    assert value.dtype == torch.float32 and len(seen) == 1
    assert seen[0][0] is x and np.allclose(seen[0][1], d_t, atol=1e-6) and seen[0][2].dtype == torch.float64


def test_loss_is_the_papers_l1_by_default():
    eps = torch.tensor(generator(0).normal(size=(2, 3, 4, 4)), dtype=torch.float32)
    value = ddpm.loss(lambda x, d_t, gamma: torch.zeros_like(d_t), eps, eps, torch.tensor([0.5, 0.9]).double(), eps)
    assert value.item() == pytest.approx(eps.abs().mean().item())


@pytest.mark.parametrize("seed", range(4))
def test_a_further_loss_sees_the_estimate_of_d_0(seed):
    gen = generator(seed)
    x, d_0, eps = (torch.tensor(gen.normal(size=(5, 3, 4, 6)), dtype=torch.float32) for _ in range(3))
    gamma = torch.tensor(gen.uniform(0.01, 1, 5))
    seen = []

    def further(d_0_hat):
        seen.append(d_0_hat)
        return d_0_hat.square().mean()

    value = ddpm.loss(lambda *_: eps, x, d_0, gamma, eps, further=further)  # a g that knows the noise
    assert torch.allclose(seen[0], d_0, atol=1e-4) and value.item() == pytest.approx(d_0.square().mean().item(), rel=1e-3)


# Eq. 3, one inverse step


@pytest.mark.parametrize("seed", range(30))
def test_step_is_the_gaussian_posterior(seed):
    gen = generator(seed)
    T = int(gen.integers(2, 30))
    t = int(gen.integers(2, T + 1))
    schedule = random_schedule(gen, T)
    alpha, gamma, gamma_prev = schedule.alpha[t], schedule.gamma[t], schedule.gamma[t - 1]
    d_0, d_t = gen.normal(size=2)
    d_prev = np.linspace(-12, 12, 200001)  # q(d_(t-1) | d_t, d_0) is q(d_t | d_(t-1)) q(d_(t-1) | d_0), normalised
    q = np.exp(-(d_t - math.sqrt(alpha) * d_prev) ** 2 / (2 * (1 - alpha))
               - (d_prev - math.sqrt(gamma_prev) * d_0) ** 2 / (2 * (1 - gamma_prev)))
    q /= q.sum()
    mean = (q * d_prev).sum()
    variance = (q * (d_prev - mean) ** 2).sum()

    eps = scalar((d_t - math.sqrt(gamma) * d_0) / math.sqrt(1 - gamma))
    for kind, expected in (("paper", 1 - alpha), ("posterior", variance)):
        still, moved = (ddpm.step(scalar(d_t), eps, t, [schedule], scalar(z), kind).item() for z in (0, 1))
        assert still == pytest.approx(mean, abs=1e-5)
        assert (moved - still) ** 2 == pytest.approx(expected, rel=1e-3, abs=1e-6)
    default = ddpm.step(scalar(d_t), eps, t, [schedule], scalar(1)).item()
    assert default == pytest.approx(mean + math.sqrt(1 - alpha), abs=1e-5)


@pytest.mark.parametrize("variance", ["paper", "posterior"])
@pytest.mark.parametrize("seed", range(5))
def test_step_adds_no_noise_at_t_1(seed, variance):
    gen = generator(seed)
    schedule = random_schedule(gen, 5)
    d_0, d_1 = gen.normal(size=2)
    eps = scalar((d_1 - math.sqrt(schedule.gamma[1]) * d_0) / math.sqrt(1 - schedule.gamma[1]))
    for eps_t in (None, scalar(math.nan)):
        assert ddpm.step(scalar(d_1), eps, 1, [schedule], eps_t, variance).item() == pytest.approx(d_0, abs=1e-5)


@pytest.mark.parametrize("variance", ["paper", "posterior"])
@pytest.mark.parametrize("seed", range(5))
def test_step_of_a_batch_with_several_schedules_is_that_of_each_patch(seed, variance):
    gen = generator(seed)
    schedules = [random_schedule(gen, int(gen.integers(4, 20))) for _ in range(6)]
    d_t, eps_hat, eps_t = (torch.tensor(gen.normal(size=(6, 3, 4, 4)), dtype=torch.float32) for _ in range(3))
    for t in (1, 2, 4):
        together = ddpm.step(d_t, eps_hat, t, schedules, eps_t, variance)
        for i in range(6):
            one = slice(i, i + 1)
            alone = ddpm.step(d_t[one], eps_hat[one], t, schedules[one], eps_t[one], variance)
            assert torch.equal(together[one], alone)


@pytest.mark.parametrize("t", [1, 2])
def test_step_refuses_another_variance(t):
    with pytest.raises(ValueError):
        ddpm.step(scalar(0), scalar(0), t, [ddpm.linear_schedule(2, 0.5)], scalar(0), "learned")


# Algorithm 1, the sampler


def column(gamma):
    return gamma[:, None, None, None]


def exact_predictor(m, s):
    """The best noise prediction E[eps | d_t] for data N(m, s^2)."""
    def g(x, d_t, gamma):
        a = column(gamma)
        return (1 - a).sqrt() * (d_t - a.sqrt() * m) / (a * s ** 2 + 1 - a)
    return g


def moments(g, T, schedule, variance="paper"):
    """Mean and standard deviation of the sampler's output where g is affine in d_t, pixel by pixel.

    Then the output is affine in the noise: pixel k sees the noise of key k as a unit impulse and gives its factor,
    and pixels beyond T, which see none, give the mean. No sampling error.
    """
    side = math.ceil(math.sqrt((T + 2) / 3))

    def impulse(key, index):
        return torch.eye(3 * side ** 2)[key].view(1, 3, side, side)

    d_0 = ddpm.sample(g, torch.zeros(1, 3, side, side), [T], {T: schedule}, impulse, variance).double().flatten()
    return d_0[-1].item(), (d_0 - d_0[-1]).norm().item()


@pytest.mark.parametrize("seed", range(24))
def test_sampler_is_exact_for_gaussian_data_of_unit_variance(seed):
    gen = generator(seed)
    T = int(gen.integers(2, 201)) if seed else 1
    m, schedule = gen.normal(), ddpm.linear_schedule(T, gen.uniform(0.01, 0.9))
    mean, std = moments(exact_predictor(m, 1), T, schedule)
    assert mean == pytest.approx(m * (1 - schedule.gamma[T]), abs=1e-4)
    assert std == pytest.approx(1 if T > 1 else math.sqrt(schedule.alpha[1]), abs=1e-4)  # without noise at t = 1


@pytest.mark.parametrize("seed", range(3))
def test_sampler_reproduces_gaussian_data_in_1000_steps(seed):
    gen = generator(seed)
    m, s = gen.normal(), gen.uniform(0.3, 2)
    mean, std = moments(exact_predictor(m, s), 1000, ddpm.linear_schedule(1000, ddpm.default_end(1000)))
    assert std == pytest.approx(s, rel=0.02) and mean == pytest.approx(m, rel=0.05)


def test_sampler_draws_what_its_moments_say():
    torch_generator = torch.Generator().manual_seed(0)

    def noise(key, index):
        return torch.randn(len(index), 3, 100, 100, generator=torch_generator)

    x, schedules = torch.zeros(2, 3, 100, 100), {30: ddpm.linear_schedule(30, 0.5)}
    d_0 = ddpm.sample(exact_predictor(0.7, 1), x, [30, 30], schedules, noise)
    assert d_0.std().item() == pytest.approx(1, abs=0.015) and d_0.mean().item() == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize("variance", ["paper", "posterior"])
@pytest.mark.parametrize("T", [1, 2, 10, 100])
def test_sampler_with_a_perfect_predictor_of_one_d_0_returns_it(T, variance):
    d_0 = torch.tensor(generator(T).normal(size=(2, 3, 8, 8)), dtype=torch.float32)

    def g(x, d_t, gamma):
        return (d_t - column(gamma).sqrt() * x) / (1 - column(gamma)).sqrt()

    noise = keyed_noise([0, 1])
    sampled = ddpm.sample(g, d_0, [T, T], {T: ddpm.linear_schedule(T, ddpm.default_end(T))}, noise, variance)
    assert torch.allclose(sampled, d_0, atol=1e-4)


def keyed_noise(names, requests=None):
    """Noise as a function of key and patch name; what is asked for goes to requests."""
    def noise(key, index):
        if requests is not None:
            requests.extend((key, names[i]) for i in index)
        fields = [np.random.default_rng([key, names[i]]).normal(size=(3, 8, 8)) for i in index]
        return torch.tensor(np.array(fields), dtype=torch.float32)
    return noise


def mixed_batch(seed):
    """Conditions that name their patch, random step counts with zeros among them, schedules, and a batch size."""
    gen = generator(seed)
    n = int(gen.integers(1, 12))
    steps = [int(T) for T in gen.choice([0, 0, 1, 2, 5, 9], n)]
    schedules = {T: random_schedule(gen, T) for T in set(steps) - {0}}
    return torch.arange(n).float().view(n, 1, 1, 1).expand(n, 3, 8, 8), steps, schedules, int(gen.integers(1, 6))


def wavy(x, d_t, gamma):
    return torch.sin(2 * d_t + x) + column(gamma).float()


@pytest.mark.parametrize("seed", range(20))
def test_sampler_evaluates_g_exactly_as_often_as_asked(seed):
    x, steps, schedules, batch = mixed_batch(seed)
    calls, told, requests = [], [], []

    def g(x, d_t, gamma):
        assert len(x) == len(d_t) == len(gamma) <= batch and gamma.dtype == torch.float64
        calls.append([(int(name), value.item()) for name, value in zip(x[:, 0, 0, 0], gamma)])
        return wavy(x, d_t, gamma)

    d_0 = ddpm.sample(g, x, steps, schedules, keyed_noise(range(len(x)), requests), batch=batch,
                      callback=lambda t, index: told.append((t, list(index))))
    for t in range(1, max(steps) + 1):
        running = [i for i, T in enumerate(steps) if T >= t]
        rows = [row for call, (told_t, _) in zip(calls, told) if told_t == t for row in call]
        assert sorted(rows) == [(i, schedules[steps[i]].gamma[t]) for i in running]
        assert sum(told_t == t for told_t, _ in told) == math.ceil(len(running) / batch)  # full batches
    assert [[name for name, _ in call] for call in calls] == [index for _, index in told]
    assert [t for t, _ in told] == sorted((t for t, _ in told), reverse=True)
    assert sum(map(len, calls)) == sum(steps)
    assert sorted(requests) == sorted((key, i) for i, T in enumerate(steps) if T for key in [0, *range(2, T + 1)])
    assert all((d_0[i] == 0).all() == (T == 0) for i, T in enumerate(steps))


@pytest.mark.parametrize("variance", ["paper", "posterior"])
@pytest.mark.parametrize("seed", range(8))
def test_sampler_is_eq_3_repeated_whatever_the_batch_size_and_the_order(seed, variance):
    x, steps, schedules, batch = mixed_batch(seed)
    order = generator(seed).permutation(len(x)).tolist()
    d_0 = ddpm.sample(wavy, x, steps, schedules, keyed_noise(range(len(x))), variance, batch)
    for size in (1, 3, 64):
        permuted = ddpm.sample(wavy, x[order], [steps[i] for i in order], schedules, keyed_noise(order), variance, size)
        assert torch.allclose(permuted, d_0[order], atol=1e-5)
    for i, T in enumerate(steps):
        noise = keyed_noise([i])
        d_t = noise(0, [0]) if T else torch.zeros(1, 3, 8, 8)
        for t in range(T, 0, -1):
            eps_hat = wavy(x[i:i + 1], d_t, torch.tensor(schedules[T].gamma[t:t + 1]))
            d_t = ddpm.step(d_t, eps_hat, t, [schedules[T]], noise(t, [0]), variance)
        assert torch.allclose(d_t[0], d_0[i], atol=1e-5)


def test_sampler_without_steps_never_calls_g():
    def g(*arguments):
        raise AssertionError

    for n in (0, 3):
        x = torch.full((n, 3, 8, 8), math.nan)
        assert torch.equal(ddpm.sample(g, x, [0] * n, {}, g, callback=g), torch.zeros(n, 3, 8, 8))
