"""The paper's Figs. 3 to 6, drawn from a model: patches over steps, crops side by side, what g adds."""

import numpy as np
import torch

from rng import ddpm, tiling
from rng.controller import STEPS
from rng.figures import Series, captioned, chart, grid
from rng.pipeline import condition, to_pixels

CROP = 128     # side of the crops of Figs. 4 and 6, shown twice as large
AMPLIFY = 4    # residuals are shown so many times larger, around grey


def picture(y):
    """(3, H, W) in [0, 1] -> uint8 (H, W, 3)."""
    return to_pixels(y.permute(1, 2, 0).cpu().numpy(), np.dtype(np.uint8))


def to_patch(image, device):
    """numpy (H, W, 3), uint8 or float32 -> its centre as (1, 3, H', W'), H' and W' at most 256."""
    top, left = (max(0, side - tiling.PATCH) // 2 for side in image.shape[:2])
    image = image[top:top + tiling.PATCH, left:left + tiling.PATCH]
    image = image / 255 if image.dtype == np.uint8 else image
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), np.float32))[None].to(device)


def shown(y, text):
    """(1, 3, H, W) in [0, 1] -> Image with its caption, about 256 pixels wide."""
    return captioned(picture(y[0]), text, zoom=max(1, tiling.PATCH // y.shape[3]))


def steps_row(model, lpips, clean, noisy, seed):
    """A row of Fig. 3: the centre patch after 0, the best and 100 steps with its -LPIPS, and -LPIPS over all counts."""
    x, y = to_patch(noisy, model.device), to_patch(clean, model.device)
    candidates = model.at_each_step(x, seed).clamp(0, 1)
    with torch.no_grad():
        scores = -lpips(candidates.cpu(), y.cpu().expand_as(candidates))
    best = int(scores.argmax())
    three = [shown(candidates[i:i + 1], f"{name}: {STEPS[i]} steps, -LPIPS {scores[i]:.4f}")
             for name, i in (("min", 0), ("best", best), ("max", len(STEPS) - 1))]
    curve = chart([Series("", list(STEPS), scores.tolist())], "steps", "-LPIPS", size=(360, 278))
    return [*three, shown(y, "ground truth"), curve]


def crops_row(named, clean):
    """A row of Figs. 4 and 6: one crop of all pictures {name: uint8 (H, W, 3)}, where "r alone" loses most detail."""
    error = np.abs(named["r alone"].astype(float) - clean).mean(axis=2).cumsum(0).cumsum(1)  # summed-area table
    error = np.pad(error, ((1, 0), (1, 0)))
    side = min(CROP, *clean.shape[:2])
    sums = error[side:, side:] - error[:-side, side:] - error[side:, :-side] + error[:-side, :-side]
    top, left = np.unravel_index(sums.argmax(), sums.shape)
    return [captioned(image[top:top + side, left:left + side], name, zoom=2)
            for name, image in named.items()]


def residual_rows(model, clean, noisy, seed, steps=100, times=(100, 60, 40, 20, 1)):
    """Fig. 5 for the centre patch: g's estimate of d_0 at several t of one run, the sum, the spectra of the residuals."""
    x, y = to_patch(noisy, model.device), to_patch(clean, model.device)
    y_r = model.reconstruct(x)
    scale = model.settings["residual_scale"]
    estimates = {}

    def g(cond, d_t, gamma):
        with torch.inference_mode():
            eps_hat = model.gen(cond, d_t, gamma).float()
        gamma = gamma[:, None, None, None].float()
        estimates[len(estimates)] = (d_t - (1 - gamma).sqrt() * eps_hat) / gamma.sqrt() / scale
        return eps_hat

    def noise(key, index):
        return tiling.patch_noise(seed, key, 0, 0)[:, :x.shape[2], :x.shape[3]][None].to(model.device)

    schedule = {steps: model.schedule(steps)}
    d_0 = ddpm.sample(g, condition(model.settings["condition"], x, y_r), [steps], schedule, noise) / scale

    def grey(residual):
        return (0.5 + AMPLIFY * residual).clamp(0, 1)

    first = [shown(x, "noisy x"), shown(y_r, "r(x)"), shown(y_r + d_0, "r(x) + d_0"), shown(y, "ground truth y")]
    second = [shown(grey(estimates[steps - t]), f"d_0 as seen at t = {t}") for t in times]
    spectra = chart([Series("y - r(x)", *spectrum(y - y_r)), Series("d_0", *spectrum(d_0))],
                    "frequency, cycles per pixel", "log10 of the power", size=(360, 278))
    return [[*first, shown(grey(y - y_r), "y - r(x)")], [*second, spectra]]


def spectrum(residual, bins=32):
    """Power of a residual (1, 3, H, W) over frequency, averaged over directions -> (frequencies, log10 of the power)."""
    power = np.abs(np.fft.fft2(residual[0].cpu().numpy())) ** 2
    height, width = power.shape[1:]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    index = np.minimum((2 * bins * frequency).astype(int), bins)  # bin `bins` gathers the corners beyond 0.5
    mean = [power[:, index == i].mean() / (height * width) for i in range(bins)]
    return [(i + 0.5) / (2 * bins) for i in range(bins)], np.log10(mean).tolist()
