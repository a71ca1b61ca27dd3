"""The numbers of docs/derivation.md, from rng/ddpm.py itself."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from rng import ddpm

TEXT = (Path(__file__).parent.parent / "docs" / "derivation.md").read_text()
ROWS = re.findall(r"^\| ([\d.]+) \| (paper|posterior) \| (.+) \|$", TEXT, re.MULTILINE)


def generated_std(s, T, variance):
    """Standard deviation of what the sampler makes of N(0, s^2) data with the best possible g, which is linear."""
    schedule = ddpm.linear_schedule(T, ddpm.default_end(T))
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    u = 1.0
    for t in range(T, 0, -1):
        gamma = schedule.gamma[t]
        eps_hat = torch.full_like(one, math.sqrt(1 - gamma) / (gamma * s**2 + 1 - gamma))
        c = ddpm.step(one, eps_hat, t, [schedule], zero, variance).item()
        sigma = ddpm.step(zero, zero, t, [schedule], one, variance).item()
        u = c**2 * u + sigma**2
    return math.sqrt(u)


@pytest.mark.parametrize("s, variance, cells", ROWS)
def test_table_of_the_two_variances(s, variance, cells):
    stated = [float(cell) for cell in cells.split("|")]
    assert stated == pytest.approx([generated_std(float(s), T, variance) for T in (10, 20, 50, 100)], abs=6e-5)


def test_the_table_is_there():
    assert len(ROWS) == 8


def test_decibels_lost():
    lost = 10 * math.log10(1 + generated_std(0.03, 20, "paper") ** 2 / 0.03**2)
    assert f"is {lost:.2f} dB here, and {10 * math.log10(2):.2f} dB for a perfect sampler" in TEXT.replace("\n", " ")


@pytest.mark.parametrize("seed", range(20))
def test_posterior_mean_in_two_forms(seed):
    """(C), in d_t and d_0, is (D), in d_t and eps; and both are what ddpm.step does with the true eps."""
    generator = np.random.default_rng(seed)
    T = int(generator.integers(2, 100))
    schedule = ddpm.linear_schedule(T, generator.uniform(0.01, 0.5))
    t = int(generator.integers(2, T + 1))
    d_0, eps = generator.normal(size=2)
    alpha, gamma, before = schedule.alpha[t], schedule.gamma[t], schedule.gamma[t - 1]
    d_t = math.sqrt(gamma) * d_0 + math.sqrt(1 - gamma) * eps
    mean = (math.sqrt(alpha) * (1 - before) * d_t + math.sqrt(before) * (1 - alpha) * d_0) / (1 - gamma)
    stepped = ddpm.step(*(torch.full((1, 1, 1, 1), value) for value in (d_t, eps)), t, [schedule], torch.zeros(1, 1, 1, 1))
    assert stepped.item() == pytest.approx(mean, rel=1e-4, abs=1e-5)
