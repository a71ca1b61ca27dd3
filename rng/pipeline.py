"""Algorithm 1 on a picture of any size: cut into patches, which go through s, r and g, and are stitched."""

import functools
import sys
from typing import NamedTuple

import numpy as np
import torch

from rng import ddpm, folder, tiling, unet
from rng.support.device import autocast, pick
from rng.support.errors import InputError
from rng.support.images import PEAK, to_pixels, to_tensor

BATCH = {"cpu": 1, "cuda": 64}  # 256-pixel patches per call; a CPU's caches hold no more, a GPU wants many
WIDEST = 16384  # pixels; a row of patches of a wider picture would need more than 1.5 GB
FLOATS = -8, 8  # what float pictures may hold: [0, 1] and the noise, but not values up to 255
DIVERGED = 100  # limit of |d_0| in [0, 1] units: even a g that is hardly trained stays below


class Parts(NamedTuple):
    """What denoise returns with parts; with parts="steps" recon and residual are None."""

    image: np.ndarray            # (H, W, 3), r(x) + residual; of a stack (N, H, W, 3), and so the others
    recon: np.ndarray | None     # (H, W, 3), r(x)
    residual: np.ndarray | None  # (H, W, 3) float16, what g added, in [0, 1] units, signed
    steps: np.ndarray            # (rows, columns) int, inverse steps of each 256-pixel patch

    def each(self, change):
        """The Parts with `change` applied to every array."""
        return Parts(*(part if part is None else change(part) for part in self))


class RnG:
    """The three networks in eval mode on one device.

    recon: r. gen: g or None. controller: s or None. settings, schedules: see folder.GenSettings, Schedules.
    batch: 256-pixel patches per network call, more if they are smaller; by default a constant per device.
    """

    sample = staticmethod(ddpm.sample)  # Algorithm 1, lines 2 to 5; a subclass may bring another sampler

    def __init__(self, recon, gen=None, settings=None, controller=None, schedules=folder.Schedules(),
                 device="auto", precision="auto", batch=None):
        self.device, self.precision = pick(device), precision
        self.batch = batch or BATCH.get(self.device.type, BATCH["cpu"])
        self.recon, self.gen, self.controller = (
            network and network.to(self.device, memory_format=torch.channels_last).eval()
            for network in (recon, gen, controller))
        self.settings, self.schedules = settings or folder.GenSettings(), schedules

    @classmethod
    def load(cls, name_or_folder="default", device="auto", precision="auto", batch=None, schedule=True):
        """A model by its folder or the name of one that ships; schedule=False does not read schedule.json.

        Only recon.pt must be there: without gen.pt steps can only be 0, without controller.pt not "auto".
        """
        return cls(*folder.load_model(folder.find(name_or_folder), schedule), device, precision, batch)

    @torch.inference_mode()
    def reconstruct(self, x):
        """r(x), not clipped: noisy patches (N, 3, H, W) in [0, 1] -> the same shape, float32."""
        if self.settings.target == "clean":
            return torch.full_like(x, 0.5)  # Table 4's "generative part only"
        return self._in_batches(self.recon, x)

    @torch.inference_mode()
    def g(self, condition, d_t, gamma):
        """g's estimate of the noise in d_t, float32, as UNet.forward."""
        if self.gen is None:
            raise InputError("this model has no gen.pt, it can only reconstruct; give --steps 0, or train g")
        return self._in_batches(self.gen, condition, d_t, gamma)

    @torch.inference_mode()
    def s(self, x):
        """The number of inverse steps for noisy patches (N, 3, H, W) in [0, 1] -> (N,) int64."""
        if self.controller is None:
            raise InputError("this model has no controller.pt, so it cannot choose the steps itself; "
                             "give --steps N, or train the controller")
        return self._in_batches(self.controller.predict_steps, x)

    @torch.inference_mode()
    def condition(self, x, y_r):
        """What g sees of patches x, y_r (N, 3, H, W), see unet.condition.

        For a g that sees r's features r is asked once more, a ninth of the time; it must be its own NAFNet.
        """
        kind, features = self.settings.condition, None
        if kind == "features":
            features = self._in_batches(functools.partial(self.recon, features=True), x)[:, 3:]
        return unet.condition(kind, x, y_r, features)

    def generate(self, x, y_r, T, noise):
        """Algorithm 1, lines 2 to 5, for patches x, y_r (N, 3, H, W): d_0 in [0, 1] units, as in denoise."""
        if T == 0:
            return torch.zeros_like(x)
        return self.unscaled(self.sample(self.g, self.condition(x, y_r), self.schedules.of(T), noise), T)

    def unscaled(self, d_0, T, limit=float("inf")):
        """d_0 as g made it in T steps -> in [0, 1] units; InputError unless it is finite and under limit."""
        d_0 = d_0 / self.settings.residual_scale
        if not d_0.abs().max() < limit:  # NaN too
            raise InputError(f"g has diverged in {T} steps; give --steps 0 or search a new schedule")
        return d_0

    @torch.inference_mode()
    def denoise(self, image, steps="auto", seed=0, detail=1.0, progress=None, parts=False):
        """Algorithm 1 on an image of any size, or on several at once.

        image: numpy (H, W, 3), RGB, uint8, uint16 or float32 in [0, 1] (noise may leave that range); or a
        stack of them, (N, H, W, 3), each of which comes out as alone: a GPU wants many small ones together.
        Stretch a 16-bit image that uses a small part of its range before, as denoise.py does.
        steps: "auto" asks s for each patch, N takes N steps everywhere, 0 gives r(x).
        seed: of the generated detail. detail: how much of it is added, 0 (r alone) to 2 times d_0.
        progress: called with the share of the work done, 0 to 1.

        Returns the picture, shape and dtype of `image`, in range. parts=True returns Parts, parts="steps"
        Parts without r(x) and the residual, which take 9 bytes a pixel. Pictures wider than WIDEST are
        denoised lying on their side. TypeError, ValueError: impossible arguments. InputError: g has diverged.
        """
        check(image, steps, seed, detail)
        if image.ndim == 3:
            of_one = self.denoise(image[None], steps, seed, detail, progress, parts)
            return of_one.each(lambda part: part[0]) if parts else of_one[0]
        if image.shape[2] > WIDEST >= image.shape[1]:
            turned = self.denoise(image.swapaxes(1, 2), steps, seed, detail, progress, parts)
            return turned.each(lambda part: part.swapaxes(1, 2)) if parts else turned.swapaxes(1, 2)
        canvas = Canvas(image, parts is True)
        step_map = self.step_map(image, steps if detail else 0)
        tell = evaluations(progress, step_map)

        def g(condition, d_t, gamma):
            return tell(self.g(condition, d_t, gamma))

        for T, places, x in self.groups(image, step_map):
            x = x.to(self.device)                                                               # (N, 3, h, w)
            y_r = tell(self.reconstruct(x))                                                     # line 1
            d_0 = torch.zeros_like(x)
            if T:                                                                               # lines 2 to 5
                noise = tiling.NoiseField([(seed, *place[1:]) for place in places], *x.shape[2:], self.device)
                d_0 = self.sample(g, self.condition(x, y_r), self.schedules.of(T), noise)
                d_0 = detail * self.unscaled(d_0, T, DIVERGED)
            y = y_r + d_0                                                                       # line 6
            canvas.add(places, torch.cat([y, y_r, d_0], dim=1).cpu())
        return Parts(canvas.image, canvas.recon, canvas.residual, step_map) if parts else canvas.image

    def step_map(self, image, steps):
        """The inverse steps of each patch, int (N, rows, columns): `steps`, or what s says for "auto"."""
        grid = len(image), tiling.count(image.shape[1]), tiling.count(image.shape[2])
        if steps != "auto":
            return np.full(grid, steps)
        step_map = np.zeros(grid, int)
        for _, places, x in self.groups(image, np.zeros(grid, int)):
            step_map[tuple(zip(*places))] = self.s(x.to(self.device)).cpu()
        return step_map

    def groups(self, image, step_map):
        """Yields (T, places, x) for patches of one step count and shape: (n, row, column), (N, 3, h, w).

        They come from the top of the first picture downwards, out of as many rows as fill a batch.
        """
        rows = [(n, row) for n in range(len(image)) for row in range(step_map.shape[1])]
        together = max(1, self.batch // step_map.shape[2])
        for first in range(0, len(rows), together):
            patches = {(n, row, col): patch for n, row in rows[first:first + together]
                       for col, patch in enumerate(patches_of_row(image[n], row))}
            kind = {place: (int(step_map[place]), patch.shape) for place, patch in patches.items()}
            for T, shape in dict.fromkeys(kind.values()):
                places = [place for place in patches if kind[place] == (T, shape)]
                yield T, places, torch.stack([patches[place] for place in places])

    def _in_batches(self, network, *inputs):
        """network(*inputs) in the model's precision, a batch at a time, smaller ones where a GPU is full."""
        while True:
            height, width = inputs[0].shape[2:]
            batch = max(1, self.batch * tiling.PATCH ** 2 // (height * width))
            try:
                with autocast(self.device, self.precision):
                    return torch.cat([network(x.contiguous(memory_format=torch.channels_last), *others)
                                      for x, *others in zip(*(z.split(batch) for z in inputs))])
            except torch.OutOfMemoryError as error:
                if self.batch == 1:
                    raise InputError("the GPU's memory does not hold one patch; close other programs, or use "
                                     "--device cpu") from error
            self.batch //= 2  # out here, where the error no longer keeps its tensors
            print(f"note: the GPU's memory is full; going on with {self.batch} patches at a time",
                  file=sys.stderr)


class Canvas:
    """The pictures (N, H, W, 3), stitched from the top while patches arrive: none is in float as a whole."""

    def __init__(self, image, parts):
        self.image = np.empty_like(image)
        self.recon = np.empty_like(image) if parts else None
        self.residual = np.empty(image.shape, np.float16) if parts else None
        self.rows, self.cols = (tiling.count(side) for side in image.shape[1:3])
        self.waiting, self.n, self.row, self.top, self.seam = {}, 0, 0, 0, tiling.Seam(-2)

    def add(self, places, patches):
        """patches: (N, 9, h, w): y, r(x) and what g added, at these places (n, row, column)."""
        self.waiting |= zip(places, patches)
        while all((self.n, self.row, col) in self.waiting for col in range(self.cols)):
            row = [self.waiting.pop((self.n, self.row, col)) for col in range(self.cols)]
            self._write(self.seam.add(tiling.join(row, -1)[..., :self.image.shape[2]]))
            self.row += 1
            if self.row == self.rows:
                self._write(self.seam.tail)
                self.n, self.row, self.top, self.seam = self.n + 1, 0, 0, tiling.Seam(-2)

    def _write(self, band):
        """The next pixels, (9, h, width); what reflection added below the picture is left out."""
        stop = min(self.top + band.shape[1], self.image.shape[1])
        here, band = (self.n, slice(self.top, stop)), band[:, :stop - self.top].permute(1, 2, 0).numpy()
        self.image[here] = to_pixels(band[..., :3], self.image.dtype)  # band: (h, width, 9)
        if self.recon is not None:
            self.recon[here], self.residual[here] = to_pixels(band[..., 3:6], self.image.dtype), band[..., 6:]
        self.top = stop


def evaluations(progress, step_map):
    """-> tell(y), which counts len(y) evaluations of r or g, tells progress their share of all, returns y."""
    done, total = 0, step_map.size + int(step_map.sum())

    def tell(y):
        nonlocal done
        done += len(y)
        if progress:
            progress(done / total)
        return y

    return tell


def check(image, steps, seed, detail):
    """TypeError or ValueError unless RnG.denoise can take these."""
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image must be a numpy array (H, W, 3), not {type(image).__name__}; read files with "
                        "rng.support.images.read_picture, turn others with numpy.asarray")
    if image.ndim not in (3, 4) or image.shape[-1] != 3 or 0 in image.shape or image.dtype not in PEAK:
        raise ValueError("image must be (H, W, 3) or (N, H, W, 3), uint8, uint16 or float32, not "
                         f"{image.shape} {image.dtype}")
    if image.dtype == np.float32 and not (FLOATS[0] <= image.min() and image.max() <= FLOATS[1]):  # NaN too
        raise ValueError("a float32 image must be finite and in [0, 1] but for noise; divide it by its white")
    whole = int, np.integer
    if steps != "auto" and (not isinstance(steps, whole) or isinstance(steps, bool) or steps < 0):
        raise ValueError(f'steps must be "auto" or a whole number from 0, not {steps!r}')
    if not isinstance(seed, whole) or isinstance(seed, bool) or not 0 <= seed < 2 ** 63:
        raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, not {seed!r}")
    if not isinstance(detail, int | float | np.number) or not 0 <= detail <= 2:
        raise ValueError(f"detail must be a number from 0 (r alone) to 2, not {detail!r}")


def patches_of_row(image, row):
    """One row of the grid: numpy (H, W, 3) -> list of (3, h, w) float32 in [0, 1]."""
    band = to_tensor(image[tiling.places(image.shape[0])[row]])
    return [band[:, :, columns] for columns in tiling.places(band.shape[2])]
