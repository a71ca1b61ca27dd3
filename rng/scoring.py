"""How pictures are scored (Sec. 4): the inputs by the protocol, other methods' pictures, the four metrics."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from rng import metrics, tiling
from rng.support.data import pictures_in
from rng.support.errors import InputError
from rng.support.images import read_rgb, to_8_bit, to_tensor
from rng.support.noise import noisy_version, wide_mix

COLUMNS = ("LPIPS", "NIQE", "PSNR", "SSIM", "steps")


class Method(NamedTuple):
    """What made a picture of the table."""

    name: str                     # as the table prints it
    kind: str                     # "truth", "noisy", "r", "fixed", "auto", "other", "best" (fixed count)
    steps: int | str | None = None   # of RnG.denoise
    detail: float = 1.0


class Row(NamedTuple):
    """A line of the table: the means over all pictures, nan where a metric has no value."""

    sigma: float | str | None     # or a kind of noise; "mean": over all sigmas; None: real noise
    method: Method
    lpips: float
    niqe: float
    psnr: float
    ssim: float
    steps: float


def centre(picture, side):
    """The centre of (H, W, 3), `side` pixels at most; all of it where side is None."""
    if side is None:
        return picture
    top, left = (max(0, length - side) // 2 for length in picture.shape[:2])
    return picture[top:top + side, left:left + side]


def inputs(item, sigma, centre_crop=None, clip_noisy=False):
    """data.Item -> (clean, noisy): uint8 (H, W, 3), float32 where noise is added.

    sigma: on the 0-255 scale; or a kind of noise.KINDS, of a strength drawn for each picture (by its name).
    InputError if a picture, or what the crop leaves of it, is too small for LPIPS.
    """
    clean, noisy = (picture if picture is None else centre(picture, centre_crop) for picture in item.read())
    if min(clean.shape[:2]) < metrics.LPIPS_SIZE:
        raise InputError(f"{item.name}: {clean.shape[1]} x {clean.shape[0]} pixels are too few to score; "
                         "give a larger --centre-crop, or leave out pictures under "
                         f"{metrics.LPIPS_SIZE} pixels a side")
    if noisy is None:
        if isinstance(sigma, str):
            generator = np.random.default_rng([*item.name.encode()])
            clean, noisy = wide_mix(clean / np.float32(255), generator, sigma)
            clean = to_8_bit(clean)  # it may have been darkened or made grey
        else:
            noisy = noisy_version(clean, sigma)
        noisy = to_8_bit(noisy) if clip_noisy else noisy
    return clean, noisy


def stacks(items, batch, sigma, centre_crop=None, clip_noisy=False):
    """Yields (items, clean, noisy) for neighbours of one size, as many as fill a batch of 256-pixel patches.

    clean, noisy: (N, H, W, 3), see inputs.
    """
    stack = []
    for item in items:
        clean, noisy = inputs(item, sigma, centre_crop, clip_noisy)
        patches = tiling.count(clean.shape[0]) * tiling.count(clean.shape[1])
        if stack and (clean.shape != stack[0][1].shape or patches * (len(stack) + 1) > batch):
            yield together(stack)
            stack = []
        stack.append((item, clean, noisy))
    yield together(stack)


def together(stack):
    """[(item, clean, noisy), ...] -> (items, clean, noisy), pictures of one size stacked."""
    some, clean, noisy = zip(*stack)
    return some, np.stack(clean), np.stack(noisy)


def named(sigma):
    """A sigma, or kind of noise, as the table and the folders name it."""
    return "-" if sigma is None else sigma if isinstance(sigma, str) else f"{sigma:g}"


def sigma_folder(folder, sigma, sigmas):
    """Where the pictures of one sigma lie: the folder itself, or DIR/15, DIR/grain, ... for several."""
    return folder / named(sigma) if len(sigmas) > 1 else folder


def named_folders(texts, reserved):
    """["NAME=DIR", ...] -> {NAME: Path}; InputError if a NAME cannot be a table row and --save folder."""
    folders = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise InputError(f"--outputs {text} is not of the form NAME=DIR")
        if name in folders or name in reserved:
            raise InputError(f"--outputs {name}: another row has this name; give each method its own")
        if name in (".", "..") or "/" in name or "\\" in name:
            raise InputError(f"--outputs {name}: a name is no path; write NAME=DIR without / and \\ in NAME")
        folders[name] = Path(folder)
    return folders


def by_stem(paths, where):
    """{stem: path}: methods' pictures go by their stems. InputError, naming `where`, if two are equal."""
    found = {}
    for path in paths:
        if path.stem in found:
            raise InputError(f"{where}: {found[path.stem].name} and {path.name} differ in the ending alone; "
                             "rename one")
        found[path.stem] = path
    return found


def output_files(folder, items, every):
    """{stem: file} of another method's pictures: one for each of `items`, maybe more of the set `every`.

    InputError where one is missing, is not of the set, or goes by the stem of another.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is missing; put the method's pictures there, named as the data set's")
    found = by_stem(pictures_in(folder), folder)
    known = by_stem([Path(item.name) for item in every], "the data set").keys()
    wanted = {Path(item.name).stem for item in items}
    for stem in sorted((wanted - found.keys()) | (found.keys() - known)):
        raise InputError(f"{folder}: {stem} is "
                         f"{'missing' if stem in wanted else 'not a picture of the data set'}; "
                         "there must be one picture for each, with the same name")
    return found


def outputs(files, item, centre_crop=None):
    """{method: {stem: file}} -> {method: its picture of `item`, uint8 (H, W, 3)}, cropped as by `inputs`.

    A picture may be whole or that centre already, as --save leaves it; InputError if its size is neither.
    """
    clean = item.read()[0] if files else None
    images = {}
    for method, of_stem in files.items():
        path = of_stem[Path(item.name).stem]
        image = read_rgb(path)
        if image.shape not in (clean.shape, centre(clean, centre_crop).shape):
            raise InputError(f"{path} is {image.shape[1]} x {image.shape[0]}, its clean picture "
                             f"{clean.shape[1]} x {clean.shape[0]} pixels; they must be of one size")
        images[method] = centre(image, centre_crop)
    return images


def measure(lpips, image, clean, patches=False):
    """image, clean: uint8 (H, W, 3) -> [LPIPS, NIQE, PSNR, SSIM], nan where a metric has no value.

    patches: the mean over non-overlapping 256 x 256 patches, the paper's way.
    """
    x, y = to_tensor(image)[None], to_tensor(clean)[None]
    if patches:
        height, width = (side // tiling.PATCH for side in image.shape[:2])
        if not height * width:
            raise InputError("--metric-patches needs pictures of at least 256 x 256 pixels; leave it out")
        side = tiling.PATCH
        x, y = (z.unfold(2, side, side).unfold(3, side, side)[0].flatten(1, 2).transpose(0, 1).contiguous()
                for z in (x, y))
    blocks = (x.shape[-2] // metrics.BLOCK) * (x.shape[-1] // metrics.BLOCK)
    with torch.no_grad():
        return [lpips(x, y).mean().item() if lpips else np.nan,
                metrics.niqe(x).mean().item() if blocks > 1 else np.nan,  # it compares at least two blocks
                metrics.psnr(x, y).mean().item(), metrics.ssim(x, y).mean().item()]


def mean(values):
    """Means over pictures (N, columns), of those that have a value: NIQE has none for a flat picture."""
    values = np.array(values, float)
    return [column[~np.isnan(column)].mean() if not np.isnan(column).all() else np.nan for column in values.T]
