"""The shipped model's output: finite and in range for any input, without a tint, without seams.

`RNG_FULL=1 python -m pytest tests/test_numerics.py` takes all of CBSD68, whole, for the tint.
"""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rng import data, scoring
from rng.images import read_rgb
from rng.pipeline import RnG

ROOT = Path(__file__).resolve().parents[1]
CBSD68 = ROOT.parent / "shared" / "data" / "cbsd68"
LINES = (224, 236, 244, 256)  # of an overlap: where the next patch starts, the blended 8 pixels, where the patch ends


@pytest.fixture(scope="module")
def model():
    return RnG.load("default", "cpu")


@pytest.fixture(scope="module")
def textured():
    return read_rgb(ROOT / "tests" / "data" / "noisy.png")


def extremes():
    random = np.random.default_rng(0)
    noise = random.standard_normal((72, 80, 3)).astype(np.float32)
    return {"black": np.zeros_like(noise), "white": np.ones_like(noise), "far below": np.full_like(noise, -3),
            "saturated": (noise > 0).astype(np.float32), "sigma 200": 0.5 + 200 / 255 * noise,
            "one red pixel": np.where(np.arange(72 * 80 * 3).reshape(noise.shape) == 0, 1, 0).astype(np.float32)}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", extremes())
def test_output_is_finite_and_in_range(name, precision):
    model = RnG.load("default", "cpu", precision)
    for steps in ("auto", 3, 10):
        parts = model.denoise(extremes()[name], steps, parts=True)
        for picture in (parts.image, parts.recon):
            assert np.isfinite(picture).all() and picture.min() >= 0 and picture.max() <= 1
        assert np.isfinite(parts.residual).all()


def tint(model, picture, sigma):
    """Mean of the output less r(x), in [0, 1] units, of each channel."""
    parts = model.denoise(data.noisy_version(picture, sigma), parts=True)
    return (parts.image.astype(np.float64) - parts.recon).mean((0, 1))


@pytest.mark.skipif(not CBSD68.is_dir(), reason="needs CBSD68 in ../shared/data")
def test_no_tint(model):
    """Under 0.002 over the set, under 0.005 for each picture."""
    items = data.items("images", CBSD68)
    items, side = (items, None) if os.environ.get("RNG_FULL") else (data.evenly(items, 4), 256)
    tints = np.array([tint(model, scoring.inputs(item, 25, side)[0], 25) for item in items])
    assert np.abs(tints).max() < 0.005 and np.abs(tints.mean(0)).max() < 0.002


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("whole, cut", [(20, 20), (10, 20), (0, 20)])
def test_no_seams(whole, cut, flat, model, textured, monkeypatch):
    """The residual jumps no more across the lines where patches meet than elsewhere: not over the four lines, nor at one.

    whole: steps of the 256-pixel patch, in the place of s; cut: of its neighbours, which end with the picture.
    """
    monkeypatch.setattr(model, "controller", SimpleNamespace(
        predict_steps=lambda x: torch.full((len(x),), whole if x.shape[2:] == (256, 256) else cut)))
    clean = np.full((300, 300, 3), 140, np.uint8) if flat else textured[:, :300]
    residuals = np.array([model.denoise(data.noisy_version(clean, 25), seed=seed, parts=True).residual.astype(np.float32)
                          for seed in range(3)])
    across = [line - 1 for line in LINES]
    for lines in (residuals, residuals.swapaxes(1, 2)):
        jumps = np.abs(np.diff(lines, axis=1)).mean((0, 2, 3))  # between line i and i + 1
        inside = np.delete(jumps, across).mean()
        assert jumps[across].mean() <= 1.1 * inside
        assert jumps[across].max() <= 1.2 * inside
