"""What several test files share."""

import contextlib
import io
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import build_step_labels
import denoise
import evaluate
import train_controller
import train_gen
import train_recon
from rng import tiling

ROOT = Path(__file__).resolve().parents[1]
ALL = {"train_recon": train_recon, "train_gen": train_gen, "evaluate": evaluate,
       "build_step_labels": build_step_labels, "train_controller": train_controller, "denoise": denoise}

ALEXNET_CONVOLUTIONS = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3),
                        10: (256, 256, 3, 3)}


def split(image):
    """image (C, H, W) -> list of patches (C, h, w), row by row; w and h are 256 but for the last ones."""
    return [image[:, rows][:, :, columns] for rows in tiling.places(image.shape[-2])
            for columns in tiling.places(image.shape[-1])]


def stitch(patches, height, width):
    """List of patches, row by row -> image (C, height, width), the inverse of split."""
    cols = tiling.count(width)
    rows = [tiling.join(patches[start:start + cols], -1) for start in range(0, len(patches), cols)]
    return tiling.join(rows, -2)[:, :height, :width]


def write_random_alexnet(path):
    """Writes AlexNet's convolutions with seeded random weights to `path`, .npz or .pth, as an LPIPS backbone.
    """
    path, random, arrays = Path(path), np.random.default_rng(0), {}
    for i, shape in ALEXNET_CONVOLUTIONS.items():
        weight = random.standard_normal(shape, dtype=np.float32)
        arrays[f"features.{i}.weight"] = weight * np.float32(np.sqrt(2 / np.prod(shape[1:])))
        arrays[f"features.{i}.bias"] = 0.1 * random.standard_normal(shape[0], dtype=np.float32)
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    return path


def same(a, b):
    """Equality of nested dictionaries and lists of tensors and plain values, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def errors(self):
        return re.findall("^error: .*$", self.err, re.MULTILINE)

    @property
    def rows(self):
        """Of the Markdown table, lists of cells."""
        lines = [line for line in self.out.splitlines() if line.startswith("| ")]
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:]]


def call(script, *args):
    """Runs a script's main in process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = script.main([str(arg) for arg in args])
    return Result(code, out.getvalue(), err.getvalue())


def picture(path, height=100, width=200, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)
