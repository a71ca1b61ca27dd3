"""The diffusion of Sec. 3.1: Eq. 1 forward, Eqs. 2 and 5 as one loss, Eq. 3 as one step, Algorithm 1's sampler.

Symbols are the paper's. t runs from T down to 1; tables have length T + 1 with gamma[0] = 1, so gamma[t] is gamma_t.
Tables are float64, images float32. All functions are pure: noise is handed in.
"""

from typing import NamedTuple

import numpy as np
import torch

T_TRAIN = 2000  # steps of the training schedule (Sec. 4, Training Details)
BETA_1 = 1e-6   # 1 - alpha at t = 1, the paper's 1 - alpha_0 (Sec. 4, Training Details)
VARIANCES = ("paper", "posterior")  # of Eq. 3's noise, see step


class Schedule(NamedTuple):
    """Noise schedule with T steps: float64 arrays of length T + 1, indexed by t; alpha[0] = 1 is unused."""

    alpha: np.ndarray
    gamma: np.ndarray  # gamma_t = alpha_1 * ... * alpha_t, gamma_0 = 1


def linear_schedule(steps, end):
    """1 - alpha_t rises linearly from 1e-6 at t = 1 to `end` in (0, 1) at t = T = steps (a single step: `end`)."""
    if steps < 1 or not BETA_1 <= end < 1:
        raise ValueError(f"a schedule needs at least 1 step and an end point in [1e-6, 1), not {steps} and {end}")
    beta = np.linspace(end, BETA_1, steps)[::-1]
    alpha = np.concatenate([[1.0], 1 - beta])
    return Schedule(alpha, np.cumprod(alpha))


def default_end(steps):
    """End point of 1 - alpha for a step count that no grid search has covered: min(0.5, 10 / T).

    The sum of 1 - alpha_t over T steps is then about 5, and gamma_T about exp(-5): d_T is nearly pure noise.
    """
    return min(0.5, 10 / steps)


def q_sample(d_0, gamma, eps):
    """Eq. 1 in closed form: d_t = sqrt(gamma_t) d_0 + sqrt(1 - gamma_t) eps.

    d_0, eps: (N, 3, H, W) float32; gamma: (N,) float64. Roots are taken in float64: 1 - gamma can be 1e-6.
    """
    gamma = gamma[:, None, None, None]
    return gamma.sqrt().float() * d_0 + (1 - gamma).sqrt().float() * eps


def draw_gamma(schedule, generator):
    """Noise level of one training sample: t uniform in 1..T, then gamma uniform in [gamma_t, gamma_(t-1)].

    The continuous noise level of refs. [13] and [41]. generator: numpy Generator -> float.
    """
    t = generator.integers(1, len(schedule.gamma))
    return generator.uniform(schedule.gamma[t], schedule.gamma[t - 1])


def estimate(d_t, eps_hat, gamma):
    """Eq. 1 solved for d_0: (d_t - sqrt(1 - gamma) eps_hat) / sqrt(gamma); shapes as for q_sample."""
    gamma = gamma[:, None, None, None]
    return (d_t - (1 - gamma).sqrt().float() * eps_hat) / gamma.sqrt().float()


def loss(g, x, d_0, gamma, eps, p=1, further=None):
    """Eqs. 2 and 5: mean |eps - g(x, sqrt(gamma) d_0 + sqrt(1 - gamma) eps, gamma)|^p, with p = 1 in the paper.

    x: condition (N, C, H, W) in [0, 1]; d_0: scaled residual (N, 3, H, W); gamma: (N,) float64; eps: (N, 3, H, W).
    further(d_0_hat): a loss of g's estimate of d_0, (N, 3, H, W), to be added; the paper has none.
    """
    d_t = q_sample(d_0, gamma, eps)
    eps_hat = g(x, d_t, gamma).float()
    value = (eps - eps_hat).abs().pow(p).mean()
    return value + further(estimate(d_t, eps_hat, gamma)) if further else value


def step(d_t, eps_hat, t, schedules, eps_t, variance="paper"):
    """Eq. 3, one inverse step d_t -> d_(t-1), for patches that may follow different schedules.

    d_t, eps_hat (= g(x, d_t, gamma_t)), eps_t: (N, 3, H, W); schedules: one Schedule per patch, each with T >= t.
    variance: "paper" adds noise of variance 1 - alpha_t (Eq. 3); "posterior" that of q(d_(t-1) | d_t, d_0),
    (1 - alpha_t) (1 - gamma_(t-1)) / (1 - gamma_t). At t = 1 no noise is added and eps_t is not looked at.
    """
    alpha = np.array([schedule.alpha[t] for schedule in schedules])
    gamma = np.array([schedule.gamma[t] for schedule in schedules])
    gamma_prev = np.array([schedule.gamma[t - 1] for schedule in schedules])
    if variance not in VARIANCES:
        raise ValueError(f'variance is "paper" or "posterior", not {variance!r}')
    sigma2 = (1 - alpha) if variance == "paper" else (1 - alpha) * (1 - gamma_prev) / (1 - gamma)

    def per_patch(values):
        return torch.as_tensor(values, dtype=torch.float32, device=d_t.device)[:, None, None, None]

    mean = per_patch(1 / np.sqrt(alpha)) * (d_t - per_patch((1 - alpha) / np.sqrt(1 - gamma)) * eps_hat)
    return mean if t == 1 else mean + per_patch(np.sqrt(sigma2)) * eps_t


@torch.inference_mode()
def sample(g, x, steps, schedules, noise, variance="paper", batch=16, callback=None):
    """Algorithm 1, d_T of line 1 and lines 2 to 5, for patches that each have their own number of steps.

    g(x, d_t, gamma) -> eps_hat; x: conditions (N, C, H, W); steps: N ints, 0 leaves a patch's d_0 at zero for free.
    schedules: {T: Schedule} with an entry for each T > 0 in steps.
    noise(key, index) -> (len(index), 3, H, W): d_T for key 0, eps_t for key t, of the patches in index (list of ints).
    At each t only the patches still running go through g, at most `batch` at a time, so neither the batch size nor
    the order of patches changes the result. callback(t, index) is called after each evaluation of g.
    Returns d_0, (N, 3, H, W) float32.
    """
    d = torch.zeros(len(x), 3, *x.shape[-2:], device=x.device)
    for t in range(max(steps, default=0), 0, -1):
        running = [i for i, T in enumerate(steps) if T >= t]
        for start in range(0, len(running), batch):
            index = running[start:start + batch]
            starting = [i for i in index if steps[i] == t]
            if starting:
                d[starting] = noise(0, starting)
            tables = [schedules[steps[i]] for i in index]
            gamma = torch.tensor([table.gamma[t] for table in tables], dtype=torch.float64, device=x.device)
            eps_hat = g(x[index], d[index], gamma).float()
            d[index] = step(d[index], eps_hat, t, tables, noise(t, index) if t > 1 else None, variance)
            if callback:
                callback(t, index)
    return d
