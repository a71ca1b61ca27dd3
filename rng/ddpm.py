"""The diffusion of Sec. 3.1: Eq. 1 forward, Eqs. 2 and 5 as one loss, Eq. 3 as one step, Algorithm 1.

Symbols are the paper's. t runs from T down to 1; tables have length T + 1 with gamma[0] = 1, so gamma[t] is
gamma_t. Tables are float64, images float32. All functions are pure: noise is handed in.
"""

from typing import NamedTuple

import numpy as np
import torch

T_TRAIN = 2000  # steps of the training schedule (Sec. 4, Training Details)
BETA_1 = 1e-6   # 1 - alpha at t = 1, the paper's 1 - alpha_0 (Sec. 4, Training Details)
VARIANCES = ("paper", "posterior")  # of Eq. 3's noise, see linear_schedule


class Schedule(NamedTuple):
    """Noise schedule with T steps: float64 arrays of length T + 1, indexed by t; alpha[0] = 1 is unused."""

    alpha: np.ndarray
    gamma: np.ndarray  # gamma_t = alpha_1 * ... * alpha_t, gamma_0 = 1
    sigma: np.ndarray  # standard deviation of the noise that Eq. 3 adds; sigma_1 = 0: the last step adds none


def linear_schedule(T, end, variance="paper"):
    """1 - alpha_t rises linearly from 1e-6 at t = 1 to `end` < 1 at t = T (a single step: `end`).

    variance of Eq. 3's noise: "paper", 1 - alpha_t, or "posterior", that of q(d_(t-1) | d_t, d_0), which is
    (1 - alpha_t) (1 - gamma_(t-1)) / (1 - gamma_t).
    """
    if T < 1 or not BETA_1 <= end < 1 or variance not in VARIANCES:
        raise ValueError("a schedule needs at least 1 step, an end point in [1e-6, 1) and a variance of "
                         f"{' or '.join(VARIANCES)}, not {T}, {end} and {variance}")
    beta = np.concatenate([[0.0], np.linspace(end, BETA_1, T)[::-1]])
    alpha = 1 - beta
    gamma = np.cumprod(alpha)
    sigma = np.sqrt(1 - alpha)
    if variance == "posterior":
        sigma[1:] = np.sqrt((1 - alpha[1:]) * (1 - gamma[:-1]) / (1 - gamma[1:]))
    sigma[1] = 0
    return Schedule(alpha, gamma, sigma)


def default_end(T):
    """End point of 1 - alpha for a step count that no grid search has covered: min(0.5, 20 / T).

    From 40 steps on the sum of 1 - alpha_t is about 10 and gamma_T below 1e-4: d_T is pure noise. With 20
    steps gamma_T is 0.002, with 10 it is 0.04. 2,000 steps are the training schedule.
    """
    return min(0.5, 20 / T)


def q_sample(d_0, gamma, eps):
    """Eq. 1 in closed form: d_t = sqrt(gamma_t) d_0 + sqrt(1 - gamma_t) eps.

    d_0, eps: (N, 3, H, W) float32; gamma: (N,) float64. Roots are taken in float64: 1 - gamma can be 1e-6.
    """
    gamma = gamma[:, None, None, None]
    return gamma.sqrt().float() * d_0 + (1 - gamma).sqrt().float() * eps


def estimate(d_t, eps_hat, gamma):
    """Eq. 1 solved for d_0: (d_t - sqrt(1 - gamma) eps_hat) / sqrt(gamma); shapes as for q_sample."""
    gamma = gamma[:, None, None, None]
    return (d_t - (1 - gamma).sqrt().float() * eps_hat) / gamma.sqrt().float()


def noise_in(d_t, d_0, gamma):
    """Eq. 1 solved for eps: (d_t - sqrt(gamma) d_0) / sqrt(1 - gamma); shapes as for q_sample, gamma < 1."""
    gamma = gamma[:, None, None, None]
    return (d_t - gamma.sqrt().float() * d_0) / (1 - gamma).sqrt().float()


def draw_gamma(schedule, generator):
    """Noise level of one training sample: t uniform in 1..T, then gamma uniform in [gamma_t, gamma_(t-1)].

    The continuous noise level of refs. [13] and [41]. generator: numpy Generator -> float.
    """
    t = generator.integers(1, len(schedule.gamma))
    return generator.uniform(schedule.gamma[t], schedule.gamma[t - 1])


def loss(g, x, d_0, gamma, eps, p=1):
    """Eqs. 2 and 5: mean |eps - g(x, sqrt(gamma) d_0 + sqrt(1 - gamma) eps, gamma)|^p; the paper's p is 1.

    x: condition (N, C, H, W) in [0, 1]. d_0: scaled residual, eps: (N, 3, H, W). gamma: (N,) float64.
    """
    d_t = q_sample(d_0, gamma, eps)
    return (eps - g(x, d_t, gamma).float()).abs().pow(p).mean()


def step(d_t, eps_hat, t, schedule, eps_t):
    """Eq. 3, one inverse step d_t -> d_(t-1).

    d_t, eps_hat = g(x, d_t, gamma_t), eps_t: (N, 3, H, W). schedule: of T >= t steps; it also says how much
    of eps_t is added, which is nothing at t = 1.
    """
    alpha_t, gamma_t, sigma_t = (float(table[t]) for table in schedule)
    mean = 1 / alpha_t ** 0.5 * (d_t - (1 - alpha_t) / (1 - gamma_t) ** 0.5 * eps_hat)
    return mean + sigma_t * eps_t


@torch.inference_mode()
def sample(g, x, schedule, noise):
    """Algorithm 1 from line 1's d_T to line 5: conditions x (N, C, H, W) -> d_0 (N, 3, H, W) float32.

    g(x, d_t, gamma) -> eps_hat, with gamma (N,) float64. schedule: its length says T.
    noise(key) -> (N, 3, H, W): d_T for key 0, eps_t for key t.
    """
    d_t = noise(0)                                                                               # line 1
    for t in range(len(schedule.gamma) - 1, 0, -1):                                              # line 2
        gamma_t = torch.full((len(x),), schedule.gamma[t], dtype=torch.float64, device=x.device)
        eps_t = noise(t) if t > 1 else 0                                                         # line 3
        d_t = step(d_t, g(x, d_t, gamma_t).float(), t, schedule, eps_t)                          # line 4
    return d_t
