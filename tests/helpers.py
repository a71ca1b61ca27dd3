"""What several test files share."""

from pathlib import Path

import numpy as np
import torch

ALEXNET_CONVOLUTIONS = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3),
                        10: (256, 256, 3, 3)}


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
