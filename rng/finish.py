"""Finishing g with LPIPS, which is not in the paper: `train_gen.py --finish`.

Like DRaFT with K = 1 (Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", ICLR
2024), one call of g with gradient gives the d_0 that LPIPS judges. What this call starts from is not sampled
step by step: a first call of g, without gradient, gives a d_0, and Eq. 1 its d_t.
"""

import torch
import torch.nn.functional as F

from rng import ddpm, metrics
from rng.unet import UNet

T, END, VARIANCE = 10, 0.7, "posterior"     # of the sampler that g is finished for
LAST_STEP = 0.5     # share of crops at t = 1, which gives the d_0 that is added; the others: t in 2..T
PERCEPTUAL, ANCHOR = 10.0, 0.02             # weights of LPIPS, of |d_0 - (y - r(x))|
TINT, GRID = 10.0, 50.0                     # weights of the guards on colour and on what repeats
HALF = 0.25         # share of LPIPS at half size
MEAN_FREE = 0.002   # mean of d_0 in a crop and channel, in [0, 1] units, that the guard lets pass
PERIOD = 4          # pixels, in which r and g could repeat a pattern, for they halve the resolution
OFFSET = 16         # pixels: LPIPS sees a window at a random offset below this, see finishing_loss
WARM_UP = 100       # iterations in which the learning rate rises


def start_from(g, features):
    """The g that finishing starts from: a UNet with residual=True that sees x, r(x) and r's features.

    It takes over all weights of a g that Eq. 5 has trained, but those of the last layer, which was made for
    noise and is now zero, as the weights of what it did not see. One that has been finished before keeps its
    last layer, but not its softness. features: r's channels.
    """
    config, weights = g.config, g.state_dict()
    finished = UNet(config["base"], config["multipliers"], config["blocks"], conditions=2, residual=True,
                    features=features)
    intro = weights["intro.weight"]                     # (base, known + 3, 3, 3), the last 3 for d_t
    known = intro.shape[1] - 3
    new = intro.new_zeros(len(intro), 6 + features - known, 3, 3)
    weights["intro.weight"] = torch.cat([intro[:, :known], new, intro[:, known:]], dim=1)
    if not g.residual:
        weights |= {f"ending.{name}": tensor for name, tensor in finished.ending.state_dict().items()}
    finished.load_state_dict(weights)
    return finished


def finishing_loss(g, lpips, condition, y_r, y, scale, generator):
    """LPIPS of r(x) + d_0 at full and half size, d_0's distance from the true residual, and two guards.

    One guards d_0's mean in each crop, the other the batch: no place in a grid of PERIOD pixels is special.

    g(condition, d_t, gamma) -> eps_hat. condition: (N, C, H, W). y_r = r(x), y: (N, 3, H, W) in [0, 1].
    scale: g's residual scale. generator: numpy's, for t, noise, window. -> scalar, with gradients to g alone.
    """
    schedule = ddpm.linear_schedule(T, END, VARIANCE)
    normal = torch.Generator().manual_seed(int(generator.integers(2 ** 62)))
    t = torch.from_numpy(generator.integers(2, T + 1, len(y)))
    t[torch.from_numpy(generator.random(len(y)) < LAST_STEP)] = 1
    gamma_t = torch.from_numpy(schedule.gamma)[t].to(y.device)
    gamma_T = torch.full_like(gamma_t, schedule.gamma[T])
    d_T, eps = (torch.randn(y.shape, generator=normal).to(y.device) for _ in range(2))
    with torch.no_grad():
        first = ddpm.estimate(d_T, g(condition, d_T, gamma_T).float(), gamma_T)
        d_t = ddpm.q_sample(first, gamma_t, eps)
        d_t[t == T] = d_T[t == T]  # as sampling starts
    d_0 = ddpm.estimate(d_t, g(condition, d_t, gamma_t).float(), gamma_t)  # (N, 3, H, W), scaled

    top, left = generator.integers(OFFSET, size=2)
    out, truth = (z.nan_to_num().clamp(0, 1)[:, :, top:, left:] for z in (y_r + d_0 / scale, y))
    perceptual = lpips(out, truth).mean()
    if min(truth.shape[2:]) >= 2 * metrics.LPIPS_SIZE:
        perceptual = torch.lerp(perceptual, lpips(F.avg_pool2d(out, 2), F.avg_pool2d(truth, 2)).mean(), HALF)
    anchor = (d_0 - scale * (y - y_r)).abs().mean()
    tint = F.relu((d_0 / scale).mean(dim=(2, 3)).abs() - MEAN_FREE).mean()
    places = torch.stack([d_0[..., row::PERIOD, col::PERIOD].mean((0, 2, 3)) / scale
                          for row in range(PERIOD) for col in range(PERIOD)])  # (16, 3)
    grid = (places - places.mean(0)).abs().mean()
    return PERCEPTUAL * perceptual + ANCHOR * anchor + TINT * tint + GRID * grid
