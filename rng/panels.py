"""The paper's figures: the plane of Fig. 1, patches over steps, crops side by side, what g adds."""

import numpy as np
import torch

from rng import ddpm, scoring, tiling
from rng.controller import STEPS
from rng.figures import Series, captioned, chart, grid

CROP = 128     # side of the crops of Figs. 4 and 6, shown twice as large
AMPLIFY = 4    # residuals are shown so many times larger, around grey


def perception_distortion(rows, title=""):
    """Fig. 1's plane -> Image; rows: (name, LPIPS, PSNR). RnG is a line over its details, the fixed step counts are another
    (with the last detail that they have), everything else is a point."""
    counts = {name.partition(" steps")[0]: (name, lpips, psnr) for name, lpips, psnr in rows if " steps" in name}
    chosen = {name.removeprefix("RnG, "): (name, lpips, psnr) for name, lpips, psnr in rows if name.startswith("RnG")}
    series = []
    for name, line in ("fixed steps", counts), ("RnG", chosen):
        if line:
            _, lpips, psnr = zip(*line.values())
            series.append(Series(name, psnr, lpips, labels=list(line) if len(line) > 1 else ()))
    points = [row for row in rows if " steps" not in row[0] and not row[0].startswith("RnG")]
    series += [Series(name, [psnr], [lpips]) for name, lpips, psnr in points]
    return chart(series, "PSNR, dB", "LPIPS, lower is better", title)


def to_patch(image, device):
    """numpy (H, W, 3), uint8 or float32 -> its centre as (1, 3, H', W'), H' and W' at most 256."""
    return scoring.to_batch(scoring.centre(image, tiling.PATCH)).to(device)


def shown(y, text):
    """(1, 3, H, W) in [0, 1] -> Image with its caption, about 256 pixels wide."""
    image = scoring.eight_bit(y[0].permute(1, 2, 0).cpu().numpy())
    return captioned(image, text, zoom=max(1, tiling.PATCH // y.shape[3]))


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
    """Fig. 5 for the centre patch: g's estimate of d_0 at several t of one run, the sum, the spectra of the residuals.

    Every d_0 is scaled as in the sum, by the schedule's detail.
    """
    x, y = to_patch(noisy, model.device), to_patch(clean, model.device)
    y_r = model.reconstruct(x)
    scale, estimates = model.detail_of(steps), []

    def record(g, inputs, eps_hat):
        """Eq. 1 solved for d_0, in [0, 1] units."""
        _, d_t, gamma = inputs
        estimates.append(scale * ddpm.estimate(d_t, eps_hat.float(), gamma) / model.settings["residual_scale"])

    def noise(key, index):
        return tiling.patch_noise(seed, key, 0, 0, *x.shape[2:])[None].to(model.device)

    hook = model.gen.register_forward_hook(record)
    d_0 = scale * model.generate(x, y_r, [steps], noise)
    hook.remove()

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
    bins = min(bins, height // 2, width // 2)  # of a small patch fewer, or some would be empty
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    index = np.minimum((2 * bins * frequency).astype(int), bins)  # bin `bins` gathers the corners beyond 0.5
    mean = [power[:, index == i].mean() / (height * width) for i in range(bins)]
    return [(i + 0.5) / (2 * bins) for i in range(bins)], np.log10(mean).tolist()
