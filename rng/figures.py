"""The paper's figures: the plane of Fig. 1, patches over steps, crops side by side, what g adds."""

import numpy as np
import torch

from rng import ddpm, metrics, tiling
from rng.controller import STEPS
from rng.scoring import centre
from rng.support.charts import Series, captioned, chart, grid
from rng.support.images import to_8_bit, to_tensor

CROP, ZOOM = 96, 3  # side of the crops of Figs. 4 and 6, and how many times larger they are shown
AMPLIFY = 4       # residuals are shown this many times larger, around grey


def perception_distortion(rows, title=""):
    """scoring.Rows -> Fig. 1's plane, an Image: lines for fixed steps and for RnG's details, else points."""
    series = []
    counts = {row.method.steps: row for row in rows if row.method.kind == "fixed"}  # each's last detail
    details = {f"{row.method.detail:g}": row for row in rows if row.method.kind == "auto"}
    for name, line in ("fixed steps", counts), ("RnG", details):
        if line:
            labels = [str(label) for label in line] if len(line) > 1 else ()
            series.append(Series(name, [row.psnr for row in line.values()],
                                 [row.lpips for row in line.values()], labels))
    series += [Series(row.method.name, [row.psnr], [row.lpips]) for row in rows
               if row.method.kind not in ("fixed", "auto")]
    return chart(series, "PSNR, dB", "LPIPS, lower is better", title)


def to_patch(image, device):
    """numpy (H, W, 3), uint8 or float32 -> its centre as (1, 3, H', W'), H' and W' at most 256."""
    return to_tensor(centre(image, tiling.PATCH))[None].to(device)


def shown(y, text):
    """(1, 3, H, W) in [0, 1] -> Image with its caption, about 256 pixels wide."""
    image = to_8_bit(y[0].permute(1, 2, 0).cpu().numpy())
    return captioned(image, text, zoom=max(1, tiling.PATCH // y.shape[3]))


def steps_row(model, lpips, clean, noisy, seed):
    """A row of Fig. 3: the centre patch after 0, best and 100 steps, the truth, -LPIPS over all counts."""
    x, y = to_patch(noisy, model.device), to_patch(clean, model.device)
    noise, y_r = tiling.NoiseField([(seed, 0, 0)], *x.shape[2:], model.device), model.reconstruct(x)
    candidates = torch.cat([y_r + model.generate(x, y_r, T, noise)
                            for T in STEPS]).clamp(0, 1)
    with torch.no_grad():
        scores = -lpips(candidates.cpu(), y.cpu().expand_as(candidates))
    best = int(scores.argmax())
    three = [shown(candidates[i:i + 1], f"{name}: {STEPS[i]} steps, -LPIPS {scores[i]:.4f}")
             for name, i in (("min", 0), ("best", best), ("max", len(STEPS) - 1))]
    curve = chart([Series("", list(STEPS), scores.tolist())], "steps", "-LPIPS", size=(360, 278))
    return [*three, shown(y, "ground truth"), curve]


def busiest(a, b):
    """The crop, two slices, in which a and b, (H, W, 3), differ most."""
    difference = np.abs(a.astype(float) - b).mean(axis=2).cumsum(0).cumsum(1)
    table = np.pad(difference, ((1, 0), (1, 0)))  # summed-area table
    side = min(CROP, *a.shape[:2])
    sums = table[side:, side:] - table[:-side, side:] - table[side:, :-side] + table[:-side, :-side]
    top, left = np.unravel_index(sums.argmax(), sums.shape)
    return slice(top, top + side), slice(left, left + side)


def comparison(noisy, recon, image):
    """Noisy, r and RnG side by side where g adds most, enlarged -> Image. All uint8 (H, W, 3)."""
    crop = busiest(recon, image)
    named = {"noisy": noisy, "r": recon, "RnG": image}
    return grid([[captioned(picture[crop], name, ZOOM) for name, picture in named.items()]])


def crops_row(lpips, named, clean):
    """A row of Figs. 4 and 6: {name: uint8 (H, W, 3)}, all cropped where "r alone" loses most detail.

    Below each its PSNR and LPIPS in the crop; the truth comes last.
    """
    crop = busiest(named["r alone"], clean)
    crops, row = {name: image[crop] for name, image in named.items()}, []
    truth = crops.pop("ground truth")
    y = to_tensor(truth)[None]
    for name, pixels in crops.items():
        x = to_tensor(pixels)[None]
        values = f"{metrics.psnr(x, y).item():.1f} dB, LPIPS {lpips(x, y).item():.3f}"
        row.append(captioned(pixels, f"{name.removesuffix(' alone')}: {values}", ZOOM))
    return [*row, captioned(truth, "truth", ZOOM)]


def residual_rows(model, clean, noisy, seed, steps=100, times=(100, 60, 40, 20, 1)):
    """Fig. 5 for the centre patch: g's d_0 at several t of one run, the sum, the spectra of the residuals."""
    x, y = to_patch(noisy, model.device), to_patch(clean, model.device)
    y_r = model.reconstruct(x)
    scale, estimates = 1 / model.settings.residual_scale, []

    def g(condition, d_t, gamma):
        eps_hat = model.g(condition, d_t, gamma)
        estimates.append(scale * ddpm.estimate(d_t, eps_hat.float(), gamma))  # Eq. 1 solved for d_0
        return eps_hat

    noise = tiling.NoiseField([(seed, 0, 0)], *x.shape[2:], model.device)
    d_0 = scale * model.sample(g, model.condition(x, y_r), model.schedules.of(steps), noise)

    def grey(residual):
        return (0.5 + AMPLIFY * residual).clamp(0, 1)

    first = [shown(x, "noisy x"), shown(y_r, "r(x)"), shown(y_r + d_0, "r(x) + d_0"), shown(y, "truth y")]
    second = [shown(grey(estimates[steps - t]), f"d_0 as seen at t = {t}") for t in times]
    spectra = chart([Series("y - r(x)", *spectrum(y - y_r)), Series("d_0", *spectrum(d_0))],
                    "frequency, cycles per pixel", "log10 of the power", size=(360, 278))
    return [[*first, shown(grey(y - y_r), "y - r(x)")], [*second, spectra]]


def spectrum(residual, bins=32):
    """Residual (1, 3, H, W) -> (frequencies, log10 of its power there, averaged over directions)."""
    power = np.abs(np.fft.fft2(residual[0].cpu().numpy())) ** 2
    height, width = power.shape[1:]
    bins = min(bins, height // 2, width // 2)  # a small patch has fewer, or some would be empty
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    index = np.minimum((2 * bins * frequency).astype(int), bins)  # bin `bins` gathers the corners beyond 0.5
    mean = [power[:, index == i].mean() / (height * width) for i in range(bins)]
    return [(i + 0.5) / (2 * bins) for i in range(bins)], np.log10(mean).tolist()
