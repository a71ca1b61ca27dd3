"""Algorithm 1 on a whole image: a model folder loaded, patches through r, s and g, and stitched."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from rng import checkpoint, ddpm, device, tiling
from rng.errors import InputError

WEIGHTS = Path(__file__).parent / "weights"
PEAK = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535, np.dtype(np.float32): 1}
BATCH = {"cpu": 4, "mps": 8, "cuda": 64}  # patches per network call: a constant, so that the same input gives the same bytes


class Parts(NamedTuple):
    """What denoise returns with parts=True: the picture, and what it is made of."""

    image: np.ndarray     # (H, W, 3), r(x) + residual
    recon: np.ndarray     # (H, W, 3), r(x)
    residual: np.ndarray  # (H, W, 3) float16, what g added, in [0, 1] units, signed
    steps: np.ndarray     # (rows, columns) int, inverse steps of each 256-pixel patch


def condition(kind, x, y_r):
    """What g is conditioned on: "noisy" x (the paper), "initial" r(x) (Table 1), or "both", concatenated."""
    return {"noisy": x, "initial": y_r, "both": torch.cat([x, y_r], dim=1)}[kind]


def load_ends(path):
    """End points of the noise schedules from schedule.json, {steps: 1 - alpha_T}; {} if there is no such file."""
    if not path.exists():
        return {}
    try:
        ends = {int(steps): float(end) for steps, end in json.loads(path.read_text())["end"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{path} is damaged; it should read {{"end": {{"10": 0.5, ...}}}}: search the schedule again') from error
    if any(steps < 1 or not ddpm.BETA_1 <= end < 1 for steps, end in ends.items()):
        raise InputError(f"{path} has a step count below 1 or an end point outside (0, 1); search the schedule again")
    return ends


class RnG:
    """The three networks of a model folder, in eval mode on one device.

    recon: r; gen: g or None; settings: g's condition, target and residual_scale; controller: s or None;
    ends: {steps: end point of 1 - alpha}; counts that are not in it end at ddpm.default_end.
    """

    def __init__(self, recon, gen=None, settings=None, controller=None, ends=None, device_name="auto", precision="auto"):
        self.device, self.precision = device.pick(device_name), precision
        self.recon, self.gen, self.controller = (
            network and network.to(self.device, memory_format=torch.channels_last).eval()
            for network in (recon, gen, controller))
        self.settings, self.ends = settings, ends or {}

    @classmethod
    def load(cls, name_or_folder="default", device="auto", precision="auto"):
        """A folder, or the name of a model that ships in rng/weights; a path that exists wins.

        Only recon.pt must be there: without gen.pt the only step count is 0, without controller.pt there is no "auto".
        """
        folder = Path(name_or_folder)
        if not folder.exists():
            folder = WEIGHTS / name_or_folder
        if not folder.is_dir():
            raise InputError(f"there is no model {name_or_folder}: name a folder with recon.pt in it, or leave --model out")
        recon = checkpoint.load_recon(folder / "recon.pt")
        gen = settings = controller = None
        if (folder / "gen.pt").exists():
            gen, settings = checkpoint.load_gen(folder / "gen.pt")
        if (folder / "controller.pt").exists():
            controller = checkpoint.load_controller(folder / "controller.pt")
        return cls(recon, gen, settings, controller, load_ends(folder / "schedule.json"), device, precision)

    def schedule(self, steps):
        """The noise schedule for one step count."""
        return ddpm.linear_schedule(steps, self.ends.get(steps, ddpm.default_end(steps)))

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
    def generate(self, x, y_r, steps, noise, variance="paper", batch=None, callback=None):
        """Algorithm 1, lines 2 to 5: d_0 in [0, 1] units, (N, 3, H, W), for patches x, y_r (N, 3, H, W).

        steps: N ints, 0 costs nothing; noise, batch and callback as in ddpm.sample.
        """
        if max(steps, default=0) == 0:
            return torch.zeros_like(x)
        if self.gen is None:
            raise InputError("this model has no gen.pt, so it can only reconstruct; give --steps 0, or train g")

        def g(x, d_t, gamma):
            with device.autocast(self.device, self.precision):
                return self.gen(x.contiguous(memory_format=torch.channels_last), d_t, gamma)

        schedules = {T: self.schedule(T) for T in set(steps) if T > 0}
        d_0 = ddpm.sample(g, condition(self.settings["condition"], x, y_r), steps, schedules, noise, variance,
                          batch or BATCH[self.device.type], callback)
        return d_0 / self.settings["residual_scale"]

    def denoise(self, image, steps="auto", seed=0, detail=1.0, batch=None, progress=None, parts=False):
        """Algorithm 1 on an image of any size.

        image: numpy (H, W, 3), RGB, uint8, uint16 or float32 in [0, 1] (noise may leave that range).
        steps: "auto" asks s for each patch; N takes N steps everywhere, 0 gives r(x).
        seed: of the generated detail; detail: scales d_0, from 0 (r alone) to 1 (the paper), the user's dial along the
        perception-distortion curve; batch: patches per network call, default a constant per device.
        progress: called with the share of the work done, 0 to 1.
        Returns the picture, shape and dtype of `image`, in range; with parts=True a Parts.
        """
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape or image.dtype not in PEAK:
            raise ValueError(f"image must be (H, W, 3) uint8, uint16 or float32, not {image.shape} {image.dtype}")
        height, width = image.shape[:2]
        rows, cols = tiling.count(height), tiling.count(width)
        batch = batch or BATCH[self.device.type]
        peak = PEAK[image.dtype]
        step_map = np.zeros((rows, cols), int)
        steps = steps if detail else 0  # r alone needs neither s nor g

        def patches(row):
            band = image[tiling.band_rows(row, height)].astype(np.float32) / peak
            return tiling.split_band(torch.from_numpy(band).permute(2, 0, 1))

        def denoised_rows():
            together = max(1, batch // cols)
            for first in range(0, rows, together):
                group = range(first, min(first + together, rows))
                x = torch.cat([patches(row) for row in group]).to(self.device)                # (N, 3, 256, 256)
                y_r = torch.cat([self.reconstruct(some) for some in x.split(batch)])           # Algorithm 1, line 1
                T = sum([self.predict_steps(some) for some in x.split(batch)], []) if steps == "auto" else [steps] * len(x)
                places = [(row, col) for row in group for col in range(cols)]
                evaluations = [0, max(1, sum(T))]

                def noise(key, index):
                    return torch.stack([tiling.patch_noise(seed, key, *places[i]) for i in index]).to(self.device)

                def count(t, index):
                    evaluations[0] += len(index)
                    if progress:
                        progress((first + len(group) * evaluations[0] / evaluations[1]) / rows)

                d_0 = detail * self.generate(x, y_r, T, noise, batch=batch, callback=count)    # lines 2 to 5
                step_map[first:first + len(group)] = np.reshape(T, (len(group), cols))
                pieces = torch.cat([y_r + d_0, y_r, d_0] if parts else [y_r + d_0], dim=1)     # line 6
                yield from pieces.cpu().split(cols)
                if progress:
                    progress(group.stop / rows)

        def to_image(y):                                                                       # (3, h, W) -> (h, W, 3)
            y = y.clamp(0, 1).permute(1, 2, 0).numpy() * peak
            return y.round().astype(image.dtype) if peak > 1 else y

        out, recon = np.empty_like(image), np.empty_like(image) if parts else None
        residual = np.empty(image.shape, np.float16) if parts else None
        top = 0
        for band in tiling.stitch_rows(denoised_rows(), width):
            here = slice(top, min(top + band.shape[1], height))
            band = band[:, :here.stop - top]
            out[here] = to_image(band[:3])
            if parts:
                recon[here] = to_image(band[3:6])
                residual[here] = band[6:].permute(1, 2, 0).numpy()
            top = here.stop
        return Parts(out, recon, residual, step_map) if parts else out
