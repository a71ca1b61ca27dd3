"""Algorithm 1 on a whole image: a model folder loaded, patches through r, s and g, and stitched."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from rng import checkpoint, ddpm, device, tiling
from rng.controller import STEPS
from rng.errors import InputError

WEIGHTS = Path(__file__).parent / "weights"
PEAK = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535, np.dtype(np.float32): 1}
BATCH = {"cpu": 1, "cuda": 64}  # patches a call; of more than one a CPU's caches do not hold the activations, a GPU wants many
WIDEST = 16384  # pixels; of a wider picture a row of patches would need more than 1.5 GB


class Parts(NamedTuple):
    """What denoise returns with parts: the picture, and what it is made of; with parts="steps" the step map alone."""

    image: np.ndarray            # (H, W, 3), r(x) + residual
    recon: np.ndarray | None     # (H, W, 3), r(x)
    residual: np.ndarray | None  # (H, W, 3) float16, what g added, in [0, 1] units, signed
    steps: np.ndarray            # (rows, columns) int, inverse steps of each 256-pixel patch


def condition(kind, x, y_r):
    """What g is conditioned on: "noisy" x (the paper), "initial" r(x) (Table 1), or "both", concatenated."""
    return {"noisy": x, "initial": y_r, "both": torch.cat([x, y_r], dim=1)}[kind]


def load_schedule(path, gen):
    """schedule.json -> (end points 1 - alpha_T, details, variance of ddpm.step), the first two each {steps: number}.

    Without such a file both are empty and the variance is the paper's. gen: the fingerprint of g, or None.
    """
    if not path.exists():
        return {}, {}, "paper"
    try:
        content = json.loads(path.read_text())
        ends, details = ({int(steps): float(value) for steps, value in part.items()}
                         for part in (content["end"], content.get("detail", {})))
        searched_with, variance = content.get("gen", gen), content.get("variance", "paper")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} is damaged; remove it and run evaluate.py --search-schedule again") from error
    if searched_with != gen:
        raise InputError(f"{path} was searched with another gen.pt; run evaluate.py --search-schedule again")
    if any(steps < 1 or not ddpm.BETA_1 <= end < 1 for steps, end in ends.items()):
        raise InputError(f"{path} has an end point outside (0, 1); run evaluate.py --search-schedule again")
    if any(not 0 <= detail <= 2 for detail in details.values()):
        raise InputError(f"{path} has a detail outside [0, 2]; run evaluate.py --search-schedule again")
    if variance not in ddpm.VARIANCES:
        raise InputError(f"{path} has an unknown variance; run evaluate.py --search-schedule again")
    return ends, details, variance


def find_folder(name_or_folder):
    """The model folder, or that of a model that ships in rng/weights; a path that exists wins."""
    for folder in (Path(name_or_folder), WEIGHTS / name_or_folder):
        if folder.is_dir():
            return folder
    raise InputError(f"there is no model {name_or_folder}; name a folder with recon.pt in it, or the default")


class RnG:
    """The three networks of a model folder, in eval mode on one device.

    recon: r; gen: g or None; settings: g's, as checkpoint.load_gen returns them; controller: s or None;
    ends: {steps: end point of 1 - alpha}; counts that are not in it end at ddpm.default_end.
    details: {steps: scale of d_0}; 1, the paper, for counts that are not in it. variance: that of ddpm.step.
    """

    def __init__(self, recon, gen=None, settings=None, controller=None, ends=None, details=None,
                 device_name="auto", precision="auto", variance="paper"):
        self.device, self.precision = device.pick(device_name), precision
        self.batch = BATCH.get(self.device.type, BATCH["cpu"])
        self.recon, self.gen, self.controller = (
            network and network.to(self.device, memory_format=torch.channels_last).eval()
            for network in (recon, gen, controller))
        self.settings, self.ends, self.details, self.variance = settings, ends or {}, details or {}, variance

    @classmethod
    def load(cls, name_or_folder="default", device="auto", precision="auto", schedule=True):
        """A model by its folder or name, as find_folder has it; schedule=False leaves schedule.json alone.

        Only recon.pt must be there: without gen.pt the only step count is 0, without controller.pt there is no "auto".
        """
        folder = find_folder(name_or_folder)
        recon = checkpoint.load_recon(folder / "recon.pt")
        gen = settings = controller = None
        if (folder / "gen.pt").exists():
            gen, settings = checkpoint.load_gen(folder / "gen.pt")
            if settings["recon"] not in (None, checkpoint.fingerprint(recon)):
                raise InputError(f"{folder / 'gen.pt'} was trained with another recon.pt; bring back that one, or train g again")
        ends, details, variance = None, None, "paper"
        if schedule:
            ends, details, variance = load_schedule(folder / "schedule.json", gen and checkpoint.fingerprint(gen))
        if (folder / "controller.pt").exists():
            controller, made_with = checkpoint.load_controller(folder / "controller.pt")
            if gen and schedule and made_with not in (None, checkpoint.made_with(folder)):
                raise InputError(f"{folder / 'controller.pt'} was trained for another gen.pt or schedule.json; bring those back, "
                                 "or remove it and train s again")
        return cls(recon, gen, settings, controller, ends, details, device, precision, variance)

    def schedule(self, steps):
        """The noise schedule for one step count."""
        return ddpm.linear_schedule(steps, self.ends.get(steps, ddpm.default_end(steps)))

    def detail_of(self, steps):
        """The scale of d_0 for one step count: that of schedule.json, 1 without; 0 for r alone."""
        return self.details.get(steps, 1.0) if steps else 0.0

    @torch.inference_mode()
    def reconstruct(self, x):
        """r(x), not clipped: noisy patches (N, 3, H, W) in [0, 1] -> the same shape, float32."""
        if self.settings and self.settings["target"] == "clean":
            return torch.full_like(x, 0.5)  # Table 4's "generative part only"
        with device.autocast(self.device, self.precision):
            return self.recon(x.to(memory_format=torch.channels_last)).float()

    @torch.inference_mode()
    def predict_steps(self, x):
        """s(x): noisy patches (N, 3, H, W) in [0, 1] -> list of N step counts."""
        if self.controller is None:
            raise InputError("this model has no controller.pt, so it cannot choose the steps itself; "
                             "give --steps N, or train the controller")
        with device.autocast(self.device, self.precision):
            return self.controller.predict_steps(x).tolist()

    @torch.inference_mode()
    def generate(self, x, y_r, steps, noise, batch=None, callback=None):
        """Algorithm 1, lines 2 to 5: d_0 in [0, 1] units, (N, 3, H, W), for patches x, y_r (N, 3, H, W).

        steps: N ints, 0 costs nothing; noise, batch and callback as in ddpm.sample; batch by default a constant number of
        pixels per device, so of smaller patches more. Not yet scaled by `detail_of`.
        """
        if max(steps, default=0) == 0:
            return torch.zeros_like(x)
        if self.gen is None:
            raise InputError("this model has no gen.pt, so it can only reconstruct; give --steps 0, or train g")

        def g(x, d_t, gamma):
            with device.autocast(self.device, self.precision):
                return self.gen(x.contiguous(memory_format=torch.channels_last), d_t, gamma)

        batch = batch or max(1, self.batch * tiling.PATCH ** 2 // (x.shape[2] * x.shape[3]))
        schedules = {T: self.schedule(T) for T in set(steps) if T > 0}
        d_0 = ddpm.sample(g, condition(self.settings["condition"], x, y_r), steps, schedules, noise, self.variance,
                          batch, callback)
        return d_0 / self.settings["residual_scale"]

    def at_each_step(self, x, seed, counts=STEPS):
        """One noisy patch x (1, 3, H, W), H and W up to 256 -> y after each of these counts with one seed, (N, 3, H, W)."""
        x = x.expand(len(counts), -1, -1, -1)
        y_r = self.reconstruct(x[:1])

        def noise(key, index):
            field = tiling.patch_noise(seed, key, 0, 0, *x.shape[2:])
            return field.expand(len(index), -1, -1, -1).to(self.device)

        detail = torch.tensor([self.detail_of(T) for T in counts], device=self.device)[:, None, None, None]
        return y_r + detail * self.generate(x, y_r.expand_as(x), list(counts), noise)

    def denoise(self, image, steps="auto", seed=0, detail=1.0, batch=None, progress=None, parts=False):
        """Algorithm 1 on an image of any size.

        image: numpy (H, W, 3), RGB, uint8, uint16 or float32 in [0, 1] (noise may leave that range).
        steps: "auto" asks s for each patch; N takes N steps everywhere, 0 gives r(x).
        seed: of the generated detail; detail: scales d_0 beyond the schedule's own scale, 0 (r alone) to 2, the user's
        dial along the perception-distortion curve; batch: patches per network call, default a constant per device.
        progress: called with the share of the work done, 0 to 1.
        Pictures wider than WIDEST are denoised lying on their side.
        Returns the picture, shape and dtype of `image`, in range; with parts=True a Parts, with parts="steps" one
        without r(x) and the residual, which take 9 bytes a pixel.
        """
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape or image.dtype not in PEAK:
            raise ValueError(f"image must be (H, W, 3) uint8, uint16 or float32, not {image.shape} {image.dtype}")
        if steps != "auto" and (not isinstance(steps, int) or steps < 0):
            raise ValueError(f'steps must be "auto" or a whole number from 0, not {steps!r}')
        if image.shape[1] > WIDEST >= image.shape[0]:
            turned = self.denoise(image.transpose(1, 0, 2), steps, seed, detail, batch, progress, parts)
            return Parts(*(part if part is None else part.swapaxes(0, 1) for part in turned)) if parts else turned.swapaxes(0, 1)
        height, width = image.shape[:2]
        grid = tiling.count(height), tiling.count(width)
        out = np.empty_like(image)
        recon, residual = (np.empty_like(image), np.empty(image.shape, np.float16)) if parts is True else (None, None)
        steps = steps if detail else 0  # r alone needs neither s nor g
        batch = batch or self.batch
        if steps == "auto":
            step_map, batch = as_fits(lambda batch: self._step_map(image, grid, batch), batch)
        else:
            step_map = np.full(grid, steps)
        rows = self._denoised_rows(image, step_map, seed, detail, batch, progress)
        top = 0
        for band in tiling.stitch_rows(rows, width):                                  # (9, h, W)
            here = slice(top, min(top + band.shape[1], height))
            band = band[:, :here.stop - top].permute(1, 2, 0).numpy()                 # (h, W, 9)
            out[here] = to_pixels(band[..., :3], image.dtype)
            if parts is True:
                recon[here], residual[here] = to_pixels(band[..., 3:6], image.dtype), band[..., 6:]
            top = here.stop
        return Parts(out, recon, residual, step_map) if parts else out

    def _step_map(self, image, grid, batch):
        """s for every patch of the grid (rows, columns) -> int, the same shape."""
        step_map = np.zeros(grid, int)
        for row, steps in enumerate(step_map):
            for index, x in same_shape(to_patches(image, row)):
                steps[index] = [T for some in x.to(self.device).split(batch) for T in self.predict_steps(some)]
        return step_map

    def _denoised_rows(self, image, step_map, seed, detail, batch, progress):
        """Yields each row of patches as a list of (9, h, w): y, r(x) and what g added."""
        rows, cols = step_map.shape
        details = detail * np.vectorize(self.detail_of, otypes=[float])(step_map)
        together = max(1, batch // cols)  # rows, so that a small picture fills the batch too
        done = 0
        for first in range(0, rows, together):
            group = range(first, min(first + together, rows))
            places = [(row, col) for row in group for col in range(cols)]
            patches = [patch for row in group for patch in to_patches(image, row)]
            finished = {}
            for index, x in same_shape(patches):
                here = [places[i] for i in index]

                def report(share):
                    if progress:
                        progress((done + len(here) * share) / step_map.size)

                def denoised(batch):
                    return self._denoised_patches(x, here, step_map, details, seed, batch, report).cpu()

                some, batch = as_fits(denoised, batch)
                finished |= zip(here, some)
                done += len(here)
                report(0)
            yield from ([finished[row, col] for col in range(cols)] for row in group)

    def _denoised_patches(self, x, places, step_map, details, seed, batch, report):
        """Algorithm 1 on patches x (N, 3, h, w) at these places of the grid -> (N, 9, h, w) as above."""
        x = x.to(self.device)
        T = [int(step_map[place]) for place in places]
        detail = torch.stack([torch.from_numpy(tiling.fade(details, *place, *x.shape[2:])) for place in places])[:, None]
        evaluations = 0

        def noise(key, index):
            return torch.stack([tiling.patch_noise(seed, key, *places[i], *x.shape[2:]) for i in index]).to(self.device)

        def count(t, index):
            nonlocal evaluations
            evaluations += len(index)
            report(evaluations / sum(T))

        y_r = torch.cat([self.reconstruct(some) for some in x.split(batch)])                   # line 1
        d_0 = detail.to(self.device) * self.generate(x, y_r, T, noise, batch, count)           # lines 2 to 5
        return torch.cat([y_r + d_0, y_r, d_0], dim=1)                                         # line 6


def as_fits(f, batch):
    """-> (f(batch), batch), the batch halved, with a word, as often as the GPU's memory does not hold it."""
    while True:
        try:
            return f(batch), batch
        except torch.OutOfMemoryError as error:
            if batch == 1:
                raise InputError("the GPU's memory does not hold one patch; close other programs, or use --device cpu") from error
        batch //= 2  # out here, where the error no longer keeps its tensors
        print(f"note: the GPU's memory is full; going on with {batch} patches at a time", file=sys.stderr)


def to_patches(image, row):
    """One row of the grid: numpy (H, W, 3) -> list of (3, h, w) float32 in [0, 1]."""
    band = image[tiling.places(image.shape[0])[row]].astype(np.float32) / PEAK[image.dtype]
    return tiling.split_band(torch.from_numpy(band).permute(2, 0, 1))


def same_shape(patches):
    """Patches (3, h, w), of which those at the image's end are smaller -> yields (indices, batch (N, 3, h, w))."""
    for shape in dict.fromkeys(patch.shape for patch in patches):
        index = [i for i, patch in enumerate(patches) if patch.shape == shape]
        yield index, torch.stack([patches[i] for i in index])


def to_pixels(y, dtype):
    """float32 in [0, 1] units -> clipped, and rounded where dtype is an integer type."""
    y = y.clip(0, 1) * PEAK[dtype]
    return y.round().astype(dtype) if PEAK[dtype] > 1 else y
