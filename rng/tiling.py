"""Patches of 256 pixels that overlap by 32 (Sec. 3.2): of an overlap 12 are dropped at each side, 8 averaged.

Images are tensors (C, H, W) of any size from 1 x 1; those that do not fit are extended by reflection and cropped back.
"""

import math
from functools import lru_cache

import numpy as np
import torch

PATCH, OVERLAP, DROP = 256, 32, 12
STRIDE = PATCH - OVERLAP
KEEP, BLEND = STRIDE + DROP, OVERLAP - 2 * DROP  # a patch's first 236 pixels, then 8 that are averaged


def count(size):
    """Number of patches along a side of `size` pixels."""
    return max(1, math.ceil((size - OVERLAP) / STRIDE))


def reflected(size):
    """Pixel index along one side, (224 * count + 32,): 0, ..., size - 1, then reflected as far as needed."""
    length = STRIDE * count(size) + OVERLAP
    return np.pad(np.arange(size), (0, length - size), mode="reflect")


def band_rows(row, height):
    """Indices of the 256 pixel rows of row `row` of the grid, in an image of this height, reflected below it."""
    return reflected(height)[row * STRIDE:row * STRIDE + PATCH]


def split_band(band):
    """One row of the grid: band (C, 256, W) -> patches (columns, C, 256, 256)."""
    return band[:, :, reflected(band.shape[-1])].unfold(2, PATCH, STRIDE).permute(2, 0, 1, 3)


def split(image):
    """image (C, H, W) -> patches (rows * columns, C, 256, 256), row by row."""
    height = image.shape[-2]
    return torch.cat([split_band(image[:, band_rows(row, height)]) for row in range(count(height))])


def join(parts, dim):
    """Joins neighbours along `dim`, one at a time: yields finished pieces; together they are the stitched whole.

    parts: an iterable of tensors with 256 pixels along dim, each overlapping the next by 32.
    """
    tail = None
    for part in parts:
        if tail is None:
            start = 0
        else:
            keep, blend, _ = tail.split([KEEP - start, BLEND, DROP], dim)
            yield keep
            yield (blend + part.narrow(dim, DROP, BLEND)) / 2
            start = DROP + BLEND
        tail = part.narrow(dim, start, PATCH - start)
    yield tail


def stitch_rows(rows, width):
    """Stitches a picture from top to bottom while its patches arrive, so that it is never held as a whole.

    rows: an iterable of (columns, C, 256, 256), one item per row of the grid; yields bands (C, h, width) in order,
    which still hold what reflection added below.
    """
    return join((torch.cat(list(join(row, -1)), -1)[..., :width] for row in rows), -2)


def stitch(patches, height, width):
    """patches (rows * columns, C, 256, 256) -> image (C, height, width), the inverse of split."""
    rows = patches.split(count(width))
    return torch.cat(list(stitch_rows(rows, width)), -2)[:, :height]


@lru_cache(maxsize=64)
def cell_noise(seed, key, row, col):
    """Standard normal noise of one 224-pixel cell of the picture's plane, (3, 224, 224) float32."""
    state = np.random.SeedSequence([seed, key, row, col]).generate_state(1, np.uint64)[0]
    return torch.randn(3, STRIDE, STRIDE, generator=torch.Generator().manual_seed(int(state) >> 1))


def patch_noise(seed, key, row, col):
    """Standard normal noise of the patch at (row, col) of the grid, (3, 256, 256) float32, a function of its arguments.

    It is cut from four cells, so overlapping patches see the same noise where they overlap.
    """
    upper = torch.cat([cell_noise(seed, key, row, col), cell_noise(seed, key, row, col + 1)], 2)
    lower = torch.cat([cell_noise(seed, key, row + 1, col), cell_noise(seed, key, row + 1, col + 1)], 2)
    return torch.cat([upper, lower], 1)[:, :PATCH, :PATCH]
