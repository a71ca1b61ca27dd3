"""The numbers of docs/derivation.md, from rng/ddpm.py itself."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gen
from rng import ddpm
from rng.pipeline import RnG
from rng.unet import UNet

TEXT = (Path(__file__).parent.parent / "docs" / "derivation.md").read_text()
ROWS = re.findall(r"^\| ([\d.]+) \| (paper|posterior) \| (.+) \|$", TEXT, re.MULTILINE)
COUNTS = 10, 20, 50, 100  # the table's columns


def full(value):
    return torch.full((1, 1, 1, 1), value)


def one_step(s, t, schedule):
    """c_t and sigma_t of (E) for data N(0, s^2) as ddpm.step has them, with the best g, which is linear."""
    gamma = schedule.gamma[t]
    eps_hat = full(math.sqrt(1 - gamma) / (gamma * s**2 + 1 - gamma))
    c = ddpm.step(full(1.0), eps_hat, t, schedule, full(0.0)).item()
    return c, ddpm.step(full(0.0), full(0.0), t, schedule, full(1.0)).item()


def generated_std(s, T, variance):
    """sqrt(u_0) of (E): standard deviation of what the sampler makes of N(0, s^2) data with that g."""
    schedule, u = ddpm.linear_schedule(T, ddpm.default_end(T), variance), 1.0
    for t in range(T, 0, -1):
        c, sigma = one_step(s, t, schedule)
        u = c**2 * u + sigma**2
    return math.sqrt(u)


def random_step(generator, variance="paper"):
    """A schedule and one of its t, not the last step."""
    T = int(generator.integers(2, 100))
    schedule = ddpm.linear_schedule(T, generator.uniform(0.01, 0.5), variance)
    return schedule, int(generator.integers(2, T + 1))


def test_every_function_that_the_derivation_names_exists():
    assert callable(train_gen.measured_scale) and callable(RnG.generate) and callable(UNet.forward)
    names = re.findall(r"`ddpm\.(\w+)`", TEXT)
    assert len(set(names)) >= 7 and all(callable(getattr(ddpm, name)) for name in names)
    assert all(callable(globals()[name]) for name in re.findall(r"`(test_\w+|generated_\w+)`", TEXT))


@pytest.mark.parametrize("s, variance, cells", ROWS)
def test_table_of_the_two_variances(s, variance, cells):
    stated = [float(cell) for cell in cells.split("|")]
    assert stated == pytest.approx([generated_std(float(s), T, variance) for T in COUNTS], abs=6e-5)


def test_grain_of_few_steps():
    assert len(ROWS) == 8
    for s, variance, cells in ROWS:
        for T, cell in zip(COUNTS, cells.split("|")):
            if variance == "paper":
                grain = math.sqrt(float(s) ** 2 + ddpm.default_end(T) / T)
                assert float(cell) == pytest.approx(grain, rel=0.06)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("variance", ddpm.VARIANCES)
def test_a_step_of_the_best_network(seed, variance):
    """(E) as the text writes it, with (B) for the posterior, is what ddpm.step does."""
    generator = np.random.default_rng(seed)
    (schedule, t), s = random_step(generator, variance), generator.uniform(0.03, 2)
    alpha, gamma, before = schedule.alpha[t], schedule.gamma[t], schedule.gamma[t - 1]
    c = (1 - (1 - alpha) / (gamma * s**2 + 1 - gamma)) / math.sqrt(alpha)
    sigma2 = 1 - alpha if variance == "paper" else (1 - alpha) * (1 - before) / (1 - gamma)
    assert one_step(s, t, schedule) == pytest.approx((c, math.sqrt(sigma2)), rel=1e-4, abs=1e-5)


def test_worked_example_of_section_6():
    text, std = TEXT.replace("\n", " "), generated_std(0.03, 20, "paper")
    assert f"detail of standard deviation {std:.4f}, more than five times the true one" in text
    assert 5 < std / 0.03 < 6
    lost = 10 * math.log10(1 + std**2 / 0.03**2)
    assert f"is {lost:.2f} dB here, and {10 * math.log10(2):.2f} dB for a perfect sampler" in text
    assert f"the grain of {std:.4f} into {std * 0.03:.3f} in" in text and 0.5 < std * 0.03 * 255 < 1.5


@pytest.mark.parametrize("seed", range(20))
def test_posterior_mean_in_two_forms(seed):
    """(C), in d_t and d_0, is (D), in d_t and eps; and both are what ddpm.step does with the true eps."""
    generator = np.random.default_rng(seed)
    schedule, t = random_step(generator)
    d_0, eps = generator.normal(size=2)
    alpha, gamma, before = schedule.alpha[t], schedule.gamma[t], schedule.gamma[t - 1]
    d_t = math.sqrt(gamma) * d_0 + math.sqrt(1 - gamma) * eps
    estimate = ddpm.estimate(full(d_t), full(eps), torch.tensor([gamma])).item()
    assert estimate == pytest.approx(d_0, rel=1e-4, abs=1e-4)
    mean = (math.sqrt(alpha) * (1 - before) * d_t + math.sqrt(before) * (1 - alpha) * d_0) / (1 - gamma)
    stepped = ddpm.step(full(d_t), full(eps), t, schedule, full(0.0))
    assert stepped.item() == pytest.approx(mean, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_weight_of_the_bound(seed):
    """Section 3: of a wrong guess of eps, (mu_t - m)^2 / (2 sigma_t^2) is its squared error, weighted."""
    generator = np.random.default_rng(seed)
    schedule, t = random_step(generator)
    d_t, eps, guess = generator.normal(size=3)
    alpha, gamma = schedule.alpha[t], schedule.gamma[t]
    mu, m = (ddpm.step(full(d_t), full(value), t, schedule, full(0.0)).item() for value in (eps, guess))
    factor = (1 - alpha) ** 2 / (2 * (1 - alpha) * alpha * (1 - gamma))  # sigma_t^2 = 1 - alpha_t
    assert (mu - m) ** 2 / (2 * (1 - alpha)) == pytest.approx(factor * (eps - guess) ** 2, rel=1e-2, abs=1e-6)


SHARES, STDS = torch.tensor([[0.6, 0.4], [0.3, 1.54]]).double()  # of section 7's smooth and strong groups
P_ROWS = re.findall(r"^\| ([12]) \| ([\d. |]+) \|$", TEXT, re.MULTILINE)


def best_of_groups(d_t, gamma, p):
    """The mean (p = 2) or the median (p = 1) of each pixel's eps, given d_t (M, n): M groups of n pixels."""
    variance = gamma * STDS**2 + 1 - gamma                                           # of d_t, (2,)
    log = SHARES.log() - d_t.shape[1] / 2 * variance.log() - d_t.square().sum(1, keepdim=True) / 2 / variance
    share = log.softmax(dim=1)[:, None]                                              # given d_t, (M, 1, 2)
    mean, std = math.sqrt(1 - gamma) * d_t[..., None] / variance, math.sqrt(gamma) * STDS / variance.sqrt()
    if p == 2:
        return (share * mean).sum(dim=2)
    low, high = mean.amin(dim=2), mean.amax(dim=2)
    for _ in range(14):
        middle = (low + high) / 2
        below = (share * torch.special.ndtr((middle[..., None] - mean) / std)).sum(dim=2) < 0.5
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return middle


def generated_groups(p, n):
    """What Eq. 3 makes in 20 steps of groups of n pixels with the best network: (M, n)."""
    schedule, generator = ddpm.linear_schedule(20, ddpm.default_end(20)), np.random.default_rng(0)
    shape = max(2000, 40000 // n), n
    d_t = torch.from_numpy(generator.standard_normal(shape))
    for t in range(20, 0, -1):
        eps_t = torch.from_numpy(generator.standard_normal(shape))
        d_t = ddpm.step(d_t, best_of_groups(d_t, schedule.gamma[t], p), t, schedule, eps_t)
    return d_t


@pytest.mark.parametrize("p, cells", P_ROWS)
def test_table_of_p(p, cells):
    assert [p for p, _ in P_ROWS] == ["2", "1"]
    stated = [float(cell) for cell in cells.split("|")]
    groups = [generated_groups(int(p), n) for n in (1, 8, 64)]
    strong = groups[-1].square().mean(dim=1).sqrt() > 0.75
    measured = [d_0.std().item() for d_0 in (*groups, groups[-1][strong], groups[-1][~strong])]
    assert stated == pytest.approx([*measured, strong.double().mean().item()], abs=0.006)


def test_constants_at_high_noise():
    """The best estimate of d_0 over sqrt(gamma) d_t: E[d_0^2] for p = 2, E|d_0| / (2 f(0)) for p = 1."""
    gamma, d_t = 1e-6, torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None]
    variance, shrunk = (SHARES * STDS**2).sum(), (SHARES * STDS).sum() / (SHARES / STDS).sum()
    assert f"Here they are {variance:.2f} and {shrunk:.2f}" in TEXT
    for p, constant in (2, variance), (1, shrunk):
        d_0 = (d_t - math.sqrt(1 - gamma) * best_of_groups(d_t, gamma, p)) / math.sqrt(gamma)
        assert (d_0 / (math.sqrt(gamma) * d_t)).numpy() == pytest.approx(constant.item(), rel=1e-3)
