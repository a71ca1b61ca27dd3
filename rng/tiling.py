"""Patches of 256 pixels overlapping by 32 (Sec. 3.2): 12 are dropped at each side, the 8 between averaged.

Images are tensors (C, H, W) of any size from 1 x 1. The last patch of a row or column is what is left of the
image, extended by reflection to a multiple of 16 and at least 64 pixels, and cropped back.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

PATCH, OVERLAP, DROP = 256, 32, 12
SMALLEST, MULTIPLE = 64, 16  # pixels, sides of the patches at the image's end
STRIDE = PATCH - OVERLAP
KEEP, BLEND = STRIDE + DROP, OVERLAP - 2 * DROP  # a patch's first 236 pixels, then 8 that are averaged


def count(size):
    """Number of patches along a side of `size` pixels."""
    return max(1, math.ceil((size - OVERLAP) / STRIDE))


def places(size):
    """Pixel indices of the patches along a side of `size` pixels: 256 each, then the rest, reflected."""
    start = STRIDE * (count(size) - 1)  # of the last patch
    last = max(SMALLEST, MULTIPLE * math.ceil((size - start) / MULTIPLE))
    extended = np.pad(np.arange(size), (0, start + last - size), mode="reflect")
    return [extended[here:here + PATCH] for here in range(0, start + 1, STRIDE)]


class Seam:
    """Joins neighbours along `dim` as they come: tensors of 256 pixels, the last fewer, overlapping by 32."""

    def __init__(self, dim):
        self.dim, self.tail, self.start = dim, None, 0  # tail: of the part before, from its pixel `start` on

    def add(self, part):
        """The next part -> the piece it finishes, up to and with 8 averaged pixels; empty for the first."""
        piece = part.narrow(self.dim, 0, 0)
        if self.tail is not None:
            keep, blend, _ = self.tail.split([KEEP - self.start, BLEND, DROP], self.dim)
            piece = torch.cat([keep, (blend + part.narrow(self.dim, DROP, BLEND)) / 2], self.dim)
            self.start = DROP + BLEND
        self.tail = part.narrow(self.dim, self.start, part.shape[self.dim] - self.start)
        return piece


def join(parts, dim):
    """Neighbours along `dim`, as for Seam -> the whole."""
    seam = Seam(dim)
    return torch.cat([*(seam.add(part) for part in parts), seam.tail], dim)


@lru_cache(maxsize=128)  # neighbouring patches share cells; 0.6 MB each
def cell_noise(seed, key, row, col):
    """Standard normal noise of one 224-pixel cell of the picture's plane, (3, 224, 224) float32."""
    state = np.random.SeedSequence([seed, key, row, col]).generate_state(1, np.uint64)[0]
    return torch.randn(3, STRIDE, STRIDE, generator=torch.Generator().manual_seed(int(state) >> 1))


class NoiseField(NamedTuple):
    """ddpm.sample's noise for some patches: called with key 0 for d_T, t for eps_t -> (N, 3, height, width).

    A function of (seed, key, place) alone: overlapping patches see the same noise where they overlap, and
    neither their order nor the batch matters.
    """

    places: list         # (seed, row, col) of each patch, row and column of the grid
    height: int = PATCH  # pixels
    width: int = PATCH
    device: str = "cpu"

    def __call__(self, key):
        return torch.stack([self.of_patch(key, *place) for place in self.places]).to(self.device)

    def of_patch(self, key, seed, row, col):
        """Standard normal noise (3, height, width) float32, cut from the cells that the patch touches."""
        rows, cols = (range(first, first + math.ceil(side / STRIDE))
                      for first, side in ((row, self.height), (col, self.width)))
        cells = [torch.cat([cell_noise(seed, key, r, c) for c in cols], 2) for r in rows]
        return torch.cat(cells, 1)[:, :self.height, :self.width]
