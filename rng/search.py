"""The paper's grid searches by LPIPS: the noise schedule (Sec. 3.1), each patch's step count (Sec. 3.2)."""

import json
import math
import os
from typing import NamedTuple

import numpy as np
import torch

from rng import ddpm, folder, tiling
from rng.controller import STEPS
from rng.support.crops import cut
from rng.support.errors import InputError, reading
from rng.support.images import to_tensor
from rng.support.noise import KINDS, add_noise, wide_mix

BATCH = 16  # patches at a time in LPIPS: only bounds the memory
NOISY_ENOUGH = 0.1  # largest gamma_T: above, g takes the noise it starts from for signal, which leaves grain


@torch.no_grad()
def lpips_of_each(lpips, y_hat, y):
    """LPIPS of each pair of patches (N, 3, H, W), the first clipped to [0, 1] -> (N,)."""
    return torch.cat([lpips(a, b) for a, b in zip(y_hat.clamp(0, 1).split(BATCH), y.split(BATCH))])


def search_schedule(model, lpips, x, y, ends, variance="paper", seed=0):
    """Sec. 3.1's "small grid search": the end point of 1 - alpha for each of 10, 20, ..., 100 steps.

    model: an RnG with g. x, y: noisy and clean patches (N, 3, H, W) in [0, 1]. ends: the end points to try.
    Ends whose gamma_T is below what g was trained on (colours shift) or above 0.1 (grain stays) are left out;
    if none is left, the smallest end is taken.
    Yields (0, {}, None, LPIPS of r alone (N,)), then (steps, {end: mean LPIPS}, chosen end, its LPIPS (N,))
    for each step count.
    """
    trained = ddpm.linear_schedule(ddpm.T_TRAIN, model.settings.train_end).gamma[-1]
    y_r = model.reconstruct(x)
    noise = tiling.NoiseField([(seed, 2 * i, 0) for i in range(len(x))], *x.shape[2:], model.device)
    yield 0, {}, None, lpips_of_each(lpips, y_r, y)
    for T in STEPS[1:]:
        tried = {}
        fitting = [end for end in ends if trained <= ddpm.linear_schedule(T, end).gamma[-1] <= NOISY_ENOUGH]
        for end in fitting or [min(ends)]:
            model.schedules = folder.Schedules({T: end}, variance=variance)
            values = lpips_of_each(lpips, y_r + model.generate(x, y_r, T, noise), y)
            tried[end] = values.mean().item()
            if tried[end] == min(tried.values()):
                best, of_best = end, values
        yield T, tried, best, of_best


class Label(NamedTuple):
    """A step label, one line of MODEL/step_labels*.jsonl: where its patch is from and what is best for it."""

    n: int                  # its number
    set: int                # place of the data set among --data
    image: str              # name of the picture
    top: int
    left: int
    size: int               # side of the patch, pixels
    sigma: float | str | None   # of NoiseMix.draw, or "wide"; None: the picture has noise of its own
    clip: bool
    kind: str | None        # of the wide mix
    seed: int               # of the noise, added and sampled
    gen: str                # fingerprints of what it was made with, see folder.made_with
    schedule: str | None
    options: str            # and of the options of build_step_labels.py
    lpips: list             # after each of STEPS, None where not tried


def label_patches(model, lpips, x, y, seeds, counts=STEPS):
    """LPIPS of noisy x against y, (N, 3, H, W) in [0, 1], after each step count -> N lists for Label.lpips.

    seeds: of the noise, one for each patch and the same for all its counts (Sec. 3.2).
    """
    x, y = x.to(model.device), y.to(model.device)
    noise = tiling.NoiseField([(seed, 0, 0) for seed in seeds], *x.shape[2:], model.device)
    y_r, tried = model.reconstruct(x), {}
    for T in counts:
        y_hat = y_r + model.generate(x, y_r, T, noise)
        tried[T] = lpips_of_each(lpips, y_hat, y).tolist()
    return [[round(tried[T][i], 6) if T in tried else None for T in STEPS] for i in range(len(x))]


def read_labels(model_folder):
    """All labels of a model folder in the order of their numbers, but for a torn last line.

    InputError if a file is damaged or was made with another gen.pt or schedule.json.
    """
    mine, labels = folder.made_with(model_folder), {}
    for path in sorted(model_folder.glob("step_labels*.jsonl")):
        with reading(f"{path} is damaged; remove it and run build_step_labels.py again"):
            text = path.read_text(errors="replace")
            found = [Label(**json.loads(line)) for line in text[:text.rfind("\n") + 1].splitlines()]
            if not all(map(_possible, found)):
                raise ValueError("no label")
        for key, name in (("gen", "gen.pt"), ("schedule", "schedule.json")):
            if any(getattr(label, key) != mine[key] for label in found):
                raise InputError(f"{path} was made with another {name}; remove it and make labels again")
        labels |= {label.n: label for label in found}
    return [labels[n] for n in sorted(labels)]


def _possible(label):
    """Whether a label's values can be from build_step_labels.py; TypeError if even their types cannot."""
    tried = [value for value in label.lpips if value is not None]
    return (all(type(value) is int and value >= 0
                for value in (label.n, label.set, label.top, label.left, label.seed))
            and type(label.size) is int and 0 < label.size <= tiling.PATCH
            and type(label.image) is str and type(label.clip) is bool
            and (label.kind in KINDS if label.sigma == "wide" else label.kind is None)
            and (label.sigma in (None, "camera", "wide") or 0 <= label.sigma <= 255)
            and len(label.lpips) == len(STEPS) and len(tried) > 0
            and all(type(value) is float and 0 <= value < math.inf for value in tried))


def drop_torn_line(path):
    """Cuts off an unfinished last line, left by a kill or a full disk."""
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def labelled_patch(clean, noisy, label):
    """The patch that a label stands for -> (noisy, clean), each float32 (3, size, size) in [0, 1].

    clean, noisy: the pictures that it is cut from, uint8 (H, W, 3), noisy None where noise is added.
    InputError if these are not the label's pictures.
    """
    place = top, left, size = label.top, label.left, label.size
    outside = any(start and start + size > side for start, side in zip((top, left), clean.shape))
    if outside or (noisy is None) != (label.sigma is not None):
        raise InputError(f"the picture {label.image} is not the one of label {label.n}; "
                         "give the labels' own --data and --root")
    clean, noisy = (picture if picture is None else cut(picture, *place) for picture in (clean, noisy))
    if noisy is None:
        generator = np.random.default_rng(label.seed)
        if label.kind:
            clean, noisy = wide_mix(clean, generator, label.kind)
        else:
            noisy = add_noise(clean, label.sigma, label.clip, generator)
    return to_tensor(noisy), to_tensor(clean)
