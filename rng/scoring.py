"""How pictures are scored (Sec. 4): the inputs by the protocol, other methods' pictures, the four metrics."""

from pathlib import Path

import numpy as np
import torch

from rng import crops, data, metrics, tiling
from rng.errors import InputError
from rng.images import EXTENSIONS
from rng.pipeline import PEAK, to_pixels


def centre(picture, side):
    """The centre of (H, W, 3), `side` pixels at most; all of it where side is None."""
    if side is None:
        return picture
    top, left = (max(0, length - side) // 2 for length in picture.shape[:2])
    return picture[top:top + side, left:left + side]


def eight_bit(image):
    """numpy (H, W, 3), uint8 or float in [0, 1] units -> uint8."""
    return image if image.dtype == np.uint8 else to_pixels(image, np.dtype(np.uint8))


def to_batch(image):
    """numpy (H, W, 3), uint8 or float32 in [0, 1] units -> (1, 3, H, W) float32 in [0, 1] units."""
    return crops.to_tensor(image).float()[None] / PEAK[image.dtype]


def inputs(item, sigma, centre_crop=None, clip_noisy=False):
    """-> (clean, noisy) of a data.Item: uint8 and, where noise is added, float32 (H, W, 3); sigma on the 0-255 scale."""
    clean, noisy = (picture if picture is None else centre(picture, centre_crop) for picture in item.read())
    if noisy is None:
        noisy = data.noisy_version(clean, sigma)
        noisy = eight_bit(noisy) if clip_noisy else noisy
    return clean, noisy


def sigma_folder(folder, sigma, sigmas):
    """Where the pictures of one sigma lie: the folder itself, or DIR/15, DIR/25, ... where there are several sigmas."""
    return folder / f"{sigma:g}" if len(sigmas) > 1 else folder


def output_files(folder, items):
    """{stem: file} of another method's pictures, one for each of `items`; a missing or extra one is an InputError."""
    if not folder.is_dir():
        raise InputError(f"{folder} is missing; put the method's pictures there, named as those of the data set")
    found = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in EXTENSIONS}
    wanted = {Path(item.name).stem for item in items}
    for stem in sorted(wanted ^ found.keys()):
        raise InputError(f"{folder}: {stem} is {'missing' if stem in wanted else 'not a picture of the data set'}; "
                         "there must be one picture for each, with the same name")
    return found


def measure(lpips, image, clean, patches=False):
    """image, clean: uint8 (H, W, 3) -> [LPIPS, NIQE, PSNR, SSIM], nan where a metric is not to be had.

    patches: the mean over non-overlapping 256 x 256 patches, the paper's way.
    """
    x, y = to_batch(image), to_batch(clean)
    if patches:
        height, width = (side // tiling.PATCH for side in image.shape[:2])
        if not height * width:
            raise InputError("--metric-patches needs pictures of at least 256 x 256 pixels; leave it out")
        x, y = (z.unfold(2, 256, 256).unfold(3, 256, 256)[0].flatten(1, 2).transpose(0, 1).contiguous() for z in (x, y))
    small = min(x.shape[-2:]) < 96 or max(x.shape[-2:]) < 192  # NIQE needs two blocks of 96 x 96
    with torch.no_grad():
        return [lpips(x, y).mean().item() if lpips else np.nan,
                np.nan if small else metrics.niqe(x).mean().item(),
                metrics.psnr(x, y).mean().item(), metrics.ssim(x, y).mean().item()]
