"""Sec. 3.1's "small grid search over the noise schedule hyper-parameters": where 1 - alpha ends for each step count."""

import torch

from rng import ddpm, tiling
from rng.controller import STEPS


def search(model, lpips, x, y, ends, details, complement=False, seed=0):
    """Finds an end point of 1 - alpha and a detail for each of 10, 20, ..., 100 steps; puts them into the model.

    model: an RnG with g; x, y: noisy and clean patches (N, 3, H, W) in [0, 1]; ends, details: the values to try.
    For each count it takes the pair of lowest mean LPIPS; with complement, of lowest mean LPIPS of the best count of
    each patch up to this one, r alone included. Left out are end points with which that many steps would start
    noisier than g was trained: they would shift colours.
    Yields (steps, {end: (mean LPIPS, best detail)}, chosen end, its LPIPS (N,)), first for r alone (0, {}, None, ...).
    """
    y_r = torch.cat([model.reconstruct(part) for part in x.split(16)])
    least = ddpm.linear_schedule(ddpm.T_TRAIN, model.settings["train_end"]).gamma[-1]

    def noise(key, index):
        return torch.stack([tiling.patch_noise(seed, key, 2 * i, 0, *x.shape[2:]) for i in index]).to(model.device)

    @torch.no_grad()
    def of_each(y_hat):
        return torch.cat([lpips(a, b) for a, b in zip(y_hat.clamp(0, 1).split(16), y.split(16))])

    lowest = of_each(y_r)
    yield 0, {}, None, lowest
    for steps in STEPS[1:]:
        tried = {}  # {end point: (what is minimised, detail, LPIPS of each patch)}
        for end in ends:
            if end > min(ends) and ddpm.linear_schedule(steps, end).gamma[-1] < least:
                continue
            model.ends[steps], model.details[steps] = end, 1.0
            d_0 = model.generate(x, y_r, [steps] * len(x), noise)
            values = {detail: of_each(y_r + detail * d_0) for detail in details}
            judged = {detail: (v.minimum(lowest) if complement else v).mean().item() for detail, v in values.items()}
            detail = min(sorted(judged), key=judged.get)
            tried[end] = judged[detail], detail, values[detail]
        best = min(sorted(tried), key=lambda end: tried[end][0])
        _, model.details[steps], values = tried[best]
        model.ends[steps] = best
        lowest = lowest.minimum(values)
        yield steps, {end: (v.mean().item(), detail) for end, (_, detail, v) in tried.items()}, best, values
