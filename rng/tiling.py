"""Patches of 256 pixels that overlap by 32 (Sec. 3.2): of an overlap 12 are dropped at each side, 8 averaged.

Images are tensors (C, H, W) of any size from 1 x 1. The last patch of a row or column is what is left of the image,
extended by reflection to a multiple of 16 and at least 64 pixels, and cropped back.
"""

import math
from functools import lru_cache

import numpy as np
import torch

PATCH, OVERLAP, DROP = 256, 32, 12
SMALLEST, MULTIPLE = 64, 16  # pixels, sides of the patches at the image's end
STRIDE = PATCH - OVERLAP
KEEP, BLEND = STRIDE + DROP, OVERLAP - 2 * DROP  # a patch's first 236 pixels, then 8 that are averaged
FADE = 48  # pixels from an overlap to where `fade` has reached the patch's own number


def count(size):
    """Number of patches along a side of `size` pixels."""
    return max(1, math.ceil((size - OVERLAP) / STRIDE))


def places(size):
    """Pixel indices of each patch along a side of `size` pixels: 256 each; what is left, reflected, for the last one."""
    start = STRIDE * (count(size) - 1)  # of the last patch
    last = max(SMALLEST, MULTIPLE * math.ceil((size - start) / MULTIPLE))
    extended = np.pad(np.arange(size), (0, start + last - size), mode="reflect")
    return [extended[here:here + PATCH] for here in range(0, start + 1, STRIDE)]


def split_band(band):
    """One row of the grid: band (C, h, W) -> list of patches (C, h, w), w = 256 but for the last one."""
    return [band[:, :, columns] for columns in places(band.shape[-1])]


def split(image):
    """image (C, H, W) -> list of patches (C, h, w), row by row: the plain definition of what split_band does for a row."""
    return [patch for rows in places(image.shape[-2]) for patch in split_band(image[:, rows])]


def join(parts, dim):
    """Joins neighbours along `dim`, one at a time: yields finished pieces; together they are the stitched whole.

    parts: an iterable of tensors with 256 pixels along dim, the last one fewer; each overlaps the next by 32.
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
        tail = part.narrow(dim, start, part.shape[dim] - start)
    yield tail


def stitch_rows(rows, width):
    """Stitches a picture from top to bottom while its patches arrive, so that it is never held as a whole.

    rows: an iterable of lists of patches (C, h, w), one list per row of the grid; yields bands (C, h, width) in order,
    which still hold what reflection added below.
    """
    return join((torch.cat(list(join(row, -1)), -1)[..., :width] for row in rows), -2)


def stitch(patches, height, width):
    """List of patches, row by row -> image (C, height, width), the inverse of split.

    The paper's stitching as one plain function, which the tests hold to its rule pixel by pixel; RnG.denoise does the
    same with stitch_rows, which never holds the whole picture.
    """
    cols = count(width)
    rows = [patches[start:start + cols] for start in range(0, len(patches), cols)]
    return torch.cat(list(stitch_rows(rows, width)), -2)[:, :height]


def fade(values, row, col, height=PATCH, width=PATCH):
    """One number for each patch, (rows, cols) -> (height, width) float32, numbers for the pixels of one of the patches.

    The patch's own number, but where it overlaps a neighbour the smaller one of the two, with a linear way between.
    """
    def along(values, place, size):  # the first axis: patches -> pixels
        if len(values) == 1:
            return values.repeat(size, 0)
        middles = STRIDE * np.arange(1, len(values)) + (OVERLAP - 1) / 2
        knots = middles[:, None] + np.array([-OVERLAP / 2 - FADE, -OVERLAP / 2, OVERLAP / 2, OVERLAP / 2 + FADE])
        smaller = np.minimum(values[:-1], values[1:])
        heights = np.stack([values[:-1], smaller, smaller, values[1:]], 1).reshape(knots.size, -1)
        return np.stack([np.interp(STRIDE * place + np.arange(size), knots.ravel(), line) for line in heights.T], 1)

    return along(along(values, row, height).T, col, width).T.astype(np.float32)


@lru_cache(maxsize=64)  # neighbouring patches share cells; 0.6 MB each
def cell_noise(seed, key, row, col):
    """Standard normal noise of one 224-pixel cell of the picture's plane, (3, 224, 224) float32."""
    state = np.random.SeedSequence([seed, key, row, col]).generate_state(1, np.uint64)[0]
    return torch.randn(3, STRIDE, STRIDE, generator=torch.Generator().manual_seed(int(state) >> 1))


def patch_noise(seed, key, row, col, height=PATCH, width=PATCH):
    """Standard normal noise of the patch at (row, col) of the grid, (3, height, width) float32.

    A function of its arguments, cut from four cells: overlapping patches see the same noise where they overlap.
    """
    upper = torch.cat([cell_noise(seed, key, row, col), cell_noise(seed, key, row, col + 1)], 2)
    lower = torch.cat([cell_noise(seed, key, row + 1, col), cell_noise(seed, key, row + 1, col + 1)], 2)
    return torch.cat([upper, lower], 1)[:, :height, :width]
