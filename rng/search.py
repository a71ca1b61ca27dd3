"""Sec. 3.1's "small grid search over the noise schedule hyper-parameters": where 1 - alpha ends for each step count."""

import torch

from rng import ddpm, tiling
from rng.controller import STEPS

BATCH = 16  # patches at a time in r and in LPIPS, the default of ddpm.sample: only bounds the memory
NOISY_ENOUGH = 0.1  # largest gamma_T: sampling starts from pure noise, which shows as grain where g takes it for signal


def search(model, lpips, x, y, ends, details, seed=0):
    """Finds an end point of 1 - alpha and a detail for each of 10, 20, ..., 100 steps; puts them into the model.

    model: an RnG with g; x, y: noisy and clean patches (N, 3, H, W) in [0, 1]; ends: the end points to try;
    details: {steps: list of details to try}. Left out, unless nothing else is there, are end points with which that many
    steps would start noisier than g was trained, which shifts colours, or with gamma_T above 0.1, which leaves grain.
    Yields (steps, {end: (mean LPIPS, best detail)}, chosen end, its LPIPS (N,)), first for r alone (0, {}, None, ...).
    """
    y_r = torch.cat([model.reconstruct(part) for part in x.split(BATCH)])              # (N, 3, H, W)
    trained = ddpm.linear_schedule(ddpm.T_TRAIN, model.settings["train_end"]).gamma[-1]

    def noise(key, index):
        return torch.stack([tiling.patch_noise(seed, key, 2 * i, 0, *x.shape[2:]) for i in index]).to(model.device)

    @torch.no_grad()
    def of_each(y_hat):
        return torch.cat([lpips(a, b) for a, b in zip(y_hat.clamp(0, 1).split(BATCH), y.split(BATCH))])  # (N,)

    yield 0, {}, None, of_each(y_r)
    for steps in STEPS[1:]:
        tried = {}
        fitting = [end for end in ends if trained <= ddpm.linear_schedule(steps, end).gamma[-1] <= NOISY_ENOUGH]
        for end in fitting or [min(ends)]:
            model.ends[steps] = end
            d_0 = model.generate(x, y_r, [steps] * len(x), noise)
            values = {detail: of_each(y_r + detail * d_0) for detail in details[steps]}
            means = {detail: v.mean().item() for detail, v in values.items()}
            detail = min(sorted(means), key=means.get)
            tried[end] = means[detail], detail
            if tried[end] == min(tried.values()):
                best, of_best = end, values[detail]
        model.ends[steps], model.details[steps] = best, tried[best][1]
        yield steps, tried, best, of_best
