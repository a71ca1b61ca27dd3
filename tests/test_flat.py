"""What g adds to flat noisy fields: no grid and no tint, which LPIPS, used in finishing g, would not see."""

import numpy as np
import pytest
import torch
from scipy.ndimage import median_filter

from rng import tiling
from rng.pipeline import RnG

FIELDS, SIDE = 24, 64
STANDS_OUT = 4       # times its neighbourhood: a line of the spectrum that an eye may see as a grid
NEIGHBOURHOOD = 9    # frequencies a side
LOW = 2              # cycles per field, up to which spectra fall too steeply for a neighbourhood
TINT = 0.002         # mean of d_0 in a channel


def strongest_line(fields):
    """The power spectrum's largest value over its neighbourhood's median. fields: (N, C, SIDE, SIDE)."""
    power = (np.abs(np.fft.fft2(fields - fields.mean((2, 3), keepdims=True))) ** 2).mean((0, 1))
    cycles = np.abs(np.fft.fftfreq(SIDE, 1 / SIDE))
    ratio = power / median_filter(power, NEIGHBOURHOOD, mode="wrap")
    return ratio[np.maximum(cycles[:, None], cycles) > LOW].max()


def white(seed):
    return np.random.default_rng(seed).standard_normal((FIELDS, 3, SIDE, SIDE))


@pytest.mark.parametrize("seed", range(10))
def test_white_noise_has_no_line(seed):
    assert strongest_line(white(seed)) < STANDS_OUT / 2


@pytest.mark.parametrize("period", [4, 8, 16])
@pytest.mark.parametrize("seed", range(3))
def test_planted_grid_is_caught(seed, period):
    grid = np.zeros((SIDE, SIDE))
    grid[::period] = grid[:, ::period] = 1
    grid = (grid - grid.mean()) / grid.std()
    assert strongest_line(white(seed) + 0.2 * grid) > STANDS_OUT


@pytest.mark.parametrize("name, steps, sigma", [
    *(("default", 10, sigma) for sigma in (15, 25, 50)),
    *(("paper", 20, sigma) for sigma in (15, 25, 50))])
def test_flat_fields_stay_flat(name, steps, sigma):
    model = RnG.load(name, "cpu", "float32")
    generator = torch.Generator().manual_seed(sigma)
    clean = 0.1 + 0.8 * torch.rand(FIELDS, 3, 1, 1, generator=generator)
    x = clean + sigma / 255 * torch.randn(FIELDS, 3, SIDE, SIDE, generator=generator)
    noise = tiling.NoiseField([(0, SIDE * n, 0) for n in range(FIELDS)], SIDE, SIDE, model.device)
    d_0 = model.generate(x, model.reconstruct(x), steps, noise)
    assert strongest_line(d_0.double().numpy()) < STANDS_OUT
    assert d_0.mean((0, 2, 3)).abs().max() < TINT
