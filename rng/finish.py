"""Finishing g with LPIPS, which is not in the paper: `train_gen.py --finish`.

Like DRaFT with K = 1 (Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", ICLR
2024), the sampler runs without gradient down to a random t, where one call of g with gradient gives d_0.
"""

import torch
import torch.nn.functional as F

from rng import ddpm, metrics

T, END, VARIANCE = 10, 0.7, "posterior"   # of the sampler that g is finished for
FIRST, LAST = 2, 7  # that t: at 1 g changes nothing, above 7 the gradient is up to a hundred times as large
PERCEPTUAL, ANCHOR, TINT = 1.0, 0.05, 10.0  # weights of LPIPS, of |d_0 - (y - r(x))|, of the guard on colour
HALF = 0.25         # share of LPIPS at half size
FLOOR = 0.05        # LPIPS counts as a share of r's plus this: grain on a smooth crop as much as lost texture
MEAN_FREE = 0.002   # mean of d_0 in a crop and channel, in [0, 1] units, that the guard lets pass
OFFSET = 16         # pixels: LPIPS sees a window at a random offset below this, see finishing_loss


def finishing_loss(g, lpips, condition, y_r, y, scale, generator):
    """LPIPS of r(x) + d_0 at full and half size, d_0's distance from the true residual, a guard on its mean.

    g(condition, d_t, gamma) -> eps_hat. condition: (N, C, H, W). y_r = r(x), y: (N, 3, H, W) in [0, 1].
    scale: g's residual scale. generator: numpy's, for t, noise, window. -> scalar, with gradients to g alone.
    """
    schedule, last = ddpm.linear_schedule(T, END, VARIANCE), int(generator.integers(FIRST, LAST + 1))
    normal = torch.Generator().manual_seed(int(generator.integers(2 ** 62)))
    d_t = torch.randn(y.shape, generator=normal).to(y.device)
    for t in range(T, last - 1, -1):
        gamma_t = torch.full((len(y),), schedule.gamma[t], dtype=torch.float64, device=y.device)
        with torch.set_grad_enabled(t == last):
            eps_hat = g(condition, d_t, gamma_t).float()
        if t > last:
            d_t = ddpm.step(d_t, eps_hat, t, schedule, torch.randn(y.shape, generator=normal).to(y.device))
    d_0 = ddpm.estimate(d_t, eps_hat, gamma_t)  # (N, 3, H, W), scaled

    top, left = generator.integers(OFFSET, size=2)
    out, smooth, truth = (z.nan_to_num().clamp(0, 1)[:, :, top:, left:] for z in (y_r + d_0 / scale, y_r, y))
    with torch.no_grad():
        share = 1 / (lpips(smooth, truth) + FLOOR)                                               # (N,)
    perceptual = (share * lpips(out, truth)).mean()
    if min(truth.shape[2:]) >= 2 * metrics.LPIPS_SIZE:
        half = lpips(F.avg_pool2d(out, 2), F.avg_pool2d(truth, 2))
        perceptual = torch.lerp(perceptual, (share * half).mean(), HALF)
    anchor = (d_0 - scale * (y - y_r)).abs().mean()
    tint = F.relu((d_0 / scale).mean(dim=(2, 3)).abs() - MEAN_FREE).mean()
    return PERCEPTUAL * perceptual + ANCHOR * anchor + TINT * tint
