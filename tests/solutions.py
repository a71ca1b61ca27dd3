"""Solutions of exercises 1, 4 and 8 of docs/exercises.md. Try them yourself first."""

import math

import torch

from rng import metrics
from rng.controller import STEPS, StepController
from rng.pipeline import RnG
from rng.support.images import to_8_bit, to_tensor


def ddim_sample(g, x, schedule, noise):
    """As ddpm.sample, but a step back adds no fresh noise (Song et al., 2021)."""
    d_t, gamma = noise(0), schedule.gamma
    for t in range(len(gamma) - 1, 0, -1):
        eps_hat = g(x, d_t, torch.full((len(x),), gamma[t], dtype=torch.float64)).float()
        d_0 = (d_t - math.sqrt(1 - gamma[t]) * eps_hat) / math.sqrt(gamma[t])
        d_t = math.sqrt(gamma[t - 1]) * d_0 + math.sqrt(1 - gamma[t - 1]) * eps_hat
    return d_t


class DDIM(RnG):
    """Exercise 1."""

    sample = staticmethod(ddim_sample)


class Controller(StepController):
    """Exercise 4: the mean of the step count under s's probabilities, rounded to the nearest class."""

    def predict_steps(self, x):
        """x: noisy patches (N, 3, H, W) in [0, 1] -> (N,) int64."""
        counts = torch.tensor(STEPS, dtype=torch.float32, device=x.device)
        mean = self(x).float().softmax(dim=1) @ counts
        return 10 * (mean / 10).round().long()


def curve(model, lpips, noisy, clean, details=(0, 0.25, 0.5, 0.75, 1), **options):
    """Exercise 8: -> (PSNR, LPIPS) of each detail. noisy, clean: (H, W, 3); options: of RnG.denoise."""
    y, points = to_tensor(to_8_bit(clean))[None], []
    for detail in details:
        y_hat = to_tensor(to_8_bit(model.denoise(noisy, detail=detail, **options)))[None]
        points.append((metrics.psnr(y_hat, y).item(), lpips(y_hat, y).item()))
    return points
