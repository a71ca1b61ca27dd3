"""PSNR, SSIM, LPIPS and NIQE with the conventions of IQA-PyTorch, which the paper used.

Each takes RGB pictures as float tensors (N, 3, H, W) in [0, 1] and returns (N,). None guesses the range of
its input: values outside [0, 1], not finite or of another shape raise ValueError. To score as the paper does,
round to 8 bit first. PSNR, SSIM and NIQE run in float64 on the CPU, LPIPS in float32 on its own device.
"""

import os
import sys
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import correlate, correlate1d
from scipy.special import gamma
from skimage.metrics import structural_similarity
from torch import nn

from rng.support.errors import InputError

WEIGHTS = Path(__file__).parent / "weights"
LPIPS_SIZE = 31  # pixels a side: what AlexNet's pools leave something of
ALEXNET_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"


def _check(x, *others):
    for picture in (x, *others):
        if picture.ndim != 4 or picture.shape[1] != 3 or not picture.is_floating_point():
            raise ValueError(f"expected float pictures (N, 3, H, W), got {picture.dtype} "
                             f"{tuple(picture.shape)}")
        if picture.shape != x.shape:
            raise ValueError(f"the pictures have different shapes, {tuple(x.shape)} and "
                             f"{tuple(picture.shape)}")
        if not ((picture >= 0) & (picture <= 1)).all():  # false for NaN too
            raise ValueError("the pictures must be finite and lie in [0, 1]")


def _luma(x):
    """0.299 R + 0.587 G + 0.114 B on 0-255, rounded: float64 array (N, H, W)."""
    r, g, b = 255 * x.detach().cpu().double().numpy().transpose(1, 0, 2, 3)
    return np.rint(0.299 * r + 0.587 * g + 0.114 * b)


def psnr(x, y):
    """Peak signal-to-noise ratio in dB over all three channels; infinite for equal pictures.

    x, y: (N, 3, H, W) in [0, 1], white being 1 -> (N,) float64.
    """
    _check(x, y)
    mse = (x.detach().cpu().double() - y.detach().cpu().double()).square().mean((1, 2, 3))
    return -10 * mse.log10()


def ssim(x, y):
    """Structural similarity of the luma, 11x11 Gaussian window of sigma 1.5, windows inside the picture only.

    x, y: (N, 3, H, W) in [0, 1], H and W at least 11 -> (N,) float64, 1 for equal pictures.
    """
    _check(x, y)
    if min(x.shape[2:]) < 11:
        raise ValueError(f"SSIM needs pictures of at least 11x11 pixels, got {x.shape[2]}x{x.shape[3]}")
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    scores = [structural_similarity(a, b, **settings) for a, b in zip(_luma(x), _luma(y))]
    return torch.tensor(scores, dtype=torch.float64)


# NIQE (Mittal et al., "Making a completely blind image quality analyzer", 2013)

with np.load(WEIGHTS / "niqe_pris_params.npz", allow_pickle=False) as _pristine:
    PRISTINE_MEAN = _pristine["mu_pris_param"][0]  # (36,)
    PRISTINE_COV = _pristine["cov_pris_param"]  # (36, 36)
    GAUSSIAN_WINDOW = _pristine["gaussian_window"]  # (7, 7), sigma 7/6
BLOCK = 96  # pixels; half as many at half size
HALF_SIZE_TAPS = np.array([-3, -9, 29, 111, 111, 29, -9, -3]) / 256  # MATLAB's antialiased bicubic imresize

SHAPES = np.arange(0.2, 10.001, 0.001)  # the grid of the authors' MATLAB code, 0.2:0.001:10
# (E|v|)^2 / E[v^2] of a generalised Gaussian with each shape; it grows with the shape
SHAPE_RATIOS = gamma(2 / SHAPES) ** 2 / (gamma(1 / SHAPES) * gamma(3 / SHAPES))


def niqe(x):
    """Natural image quality evaluator with the official pristine model, 0 or more; lower is better.

    x: (N, 3, H, W) in [0, 1] -> (N,) float64, NaN where fewer than two blocks have any structure. The picture
    is cropped from the top left to 96x96 blocks; fewer than two raise ValueError. In large flat areas the
    sign of rounding errors counts, so there the published implementations differ by some percent.
    """
    _check(x)
    if (x.shape[2] // BLOCK) * (x.shape[3] // BLOCK) < 2:
        raise ValueError(f"NIQE needs at least two blocks of {BLOCK}x{BLOCK} pixels, got "
                         f"{x.shape[2]}x{x.shape[3]}")
    return torch.tensor([_niqe(luma) for luma in _luma(x)], dtype=torch.float64)


def _niqe(luma):
    """Luma (H, W), 0 to 255, rounded -> NIQE, a float or NaN."""
    rows, cols = luma.shape[0] // BLOCK, luma.shape[1] // BLOCK
    luma = luma[: rows * BLOCK, : cols * BLOCK]
    features = []
    for size, plane in ((BLOCK, luma), (BLOCK // 2, _half_size(luma))):
        blocks = _normalise(plane).reshape(rows, size, cols, size).swapaxes(1, 2)  # (rows, cols, size, size)
        features += _block_features(blocks.reshape(-1, size, size))  # 18 more, each (rows * cols,)
    features = np.stack(features, axis=1)                                                # (rows * cols, 36)

    complete = features[~np.isnan(features).any(axis=1)]  # (B, 36), B <= rows * cols
    if len(complete) < 2:
        return np.nan
    difference = np.nanmean(features, axis=0) - PRISTINE_MEAN                            # (36,)
    precision = np.linalg.pinv((np.cov(complete, rowvar=False) + PRISTINE_COV) / 2)      # (36, 36)
    return np.sqrt(difference @ precision @ difference)


def _half_size(plane):
    """(H, W) -> (H/2, W/2), not rounded; H and W even."""
    plane = correlate1d(plane, HALF_SIZE_TAPS, axis=0, mode="reflect", origin=-1)[::2]
    return correlate1d(plane, HALF_SIZE_TAPS, axis=1, mode="reflect", origin=-1)[:, ::2]


def _normalise(plane):
    """(H, W), 0 to 255 -> the same shape: (plane - local mean) / (local standard deviation + 1)."""
    # Not as two one-dimensional windows: the rounding errors in flat areas would differ (see niqe).
    mean = correlate(plane, GAUSSIAN_WINDOW, mode="nearest")
    variance = correlate(plane**2, GAUSSIAN_WINDOW, mode="nearest") - mean**2
    return (plane - mean) / (np.sqrt(np.abs(variance)) + 1)


def _block_features(blocks):
    """The 18 features of one scale, each (B,), of normalised blocks (B, size, size)."""
    shape, left, right = _fit_aggd(blocks)
    features = [shape, (left + right) / 2]
    for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
        shape, left, right = _fit_aggd(blocks * np.roll(blocks, shift, axis=(1, 2)))
        features += [shape, (right - left) * gamma(2 / shape) / gamma(1 / shape), left, right]
    return features


def _fit_aggd(blocks):
    """Fits asymmetric generalised Gaussians by moments: (B, size, size) -> shape, two scales, each (B,)."""
    square, negative, positive = blocks**2, blocks < 0, blocks > 0
    with np.errstate(invalid="ignore"):  # 0 / 0 = NaN where all values have one sign
        left = np.sqrt((square * negative).sum((1, 2)) / negative.sum((1, 2)))
        right = np.sqrt((square * positive).sum((1, 2)) / positive.sum((1, 2)))
        ratio = left / right
        asymmetry = (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1) ** 2
        moments = np.abs(blocks).mean((1, 2)) ** 2 / square.mean((1, 2)) * asymmetry
    midpoints = (SHAPE_RATIOS[1:] + SHAPE_RATIOS[:-1]) / 2  # to find the nearest ratio without comparing all
    shape = SHAPES[np.searchsorted(midpoints, np.nan_to_num(moments))]  # NaN: smallest, as in MATLAB's min
    scale = np.sqrt(gamma(1 / shape) / gamma(3 / shape))
    return shape, left * scale, right * scale


# LPIPS (Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric", 2018)


class LPIPS(nn.Module):
    """Learned perceptual distance, AlexNet v0.1: 0 for equal pictures, differentiable, parameters frozen.

    The linear heads are vendored. `backbone`, or else the environment variable RNG_ALEXNET, names a file with
    torchvision's AlexNet (.pth, or .npz of its convolutions). Without either the official file is downloaded
    once into torch's cache. Raises InputError where no usable AlexNet can be had.
    """

    def __init__(self, backbone=None):
        super().__init__()
        self.features = nn.Sequential(  # numbered as in torchvision's alexnet().features
            nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
        )
        _load_alexnet(self.features, backbone)
        with np.load(WEIGHTS / "lpips_alex.npz", allow_pickle=False) as heads:
            self.heads = nn.ParameterList(torch.from_numpy(heads[f"lin{i}"]).view(-1, 1, 1) for i in range(5))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, x, y):
        """(N, 3, H, W) twice, in [0, 1] and at least 31x31 -> (N,) float32; float32 under autocast too."""
        _check(x, y)
        if min(x.shape[2:]) < LPIPS_SIZE:
            least, size = f"{LPIPS_SIZE}x{LPIPS_SIZE}", f"{x.shape[2]}x{x.shape[3]}"
            raise ValueError(f"LPIPS needs pictures of at least {least} pixels, got {size}")
        both = torch.cat([x, y]).float().contiguous(memory_format=torch.channels_last)  # (2 N, 3, H, W)
        with torch.autocast(x.device.type, enabled=False):
            layers = zip((z.chunk(2) for z in self._directions(both)), self.heads)  # five; heads (C, 1, 1)
            return sum(F.conv2d((u - v).square(), head[None]).mean((1, 2, 3)) for (u, v), head in layers)

    def _directions(self, x):
        """x (N, 3, H, W) in [0, 1] -> each ReLU's output, (N, C, h, w), of unit length over the channels."""
        x = (2 * x - 1 - self.shift) / self.scale           # (N, 3, H, W), normalised as AlexNet was trained
        for layer in self.features:
            x = layer(x)                                    # (N, C, h, w), C = 64, 192, 384, 256, 256
            if isinstance(layer, nn.ReLU):
                # for pixels where all channels are 0: the lpips package's 1e-10 beside the norm, squared
                yield x * x.square().sum(1, keepdim=True).clamp_min(1e-20).rsqrt()  # (N, C, h, w)


def _load_alexnet(features, backbone):
    """Loads torchvision's AlexNet convolutions into `features` from the file named, or the official URL."""
    backbone = backbone or os.environ.get("RNG_ALEXNET")
    remedy = f"get {ALEXNET_URL} and name the file with --lpips-backbone FILE or in RNG_ALEXNET"
    if backbone and not Path(backbone).is_file():
        raise InputError(f"no AlexNet for LPIPS at {backbone}: {remedy}")
    try:
        if not backbone:
            options = {"check_hash": True, "weights_only": True, "map_location": "cpu", "progress": False}
            state = torch.hub.load_state_dict_from_url(ALEXNET_URL, **options)
        elif Path(backbone).suffix == ".npz":
            with np.load(backbone, allow_pickle=False) as arrays:
                state = {name: torch.from_numpy(arrays[name]) for name in arrays}
        else:
            state = torch.load(backbone, weights_only=True, map_location="cpu")
        prefix = "features."
        features.load_state_dict({k.removeprefix(prefix): v for k, v in state.items()
                                  if k.startswith(prefix)})
    except Exception as error:  # a damaged or foreign file fails in many ways, and so does a download
        if backbone:
            raise InputError(f"{backbone} does not hold torchvision's AlexNet: {remedy}") from error
        reason = shorten(str(error), 120)
        raise InputError(f"AlexNet for LPIPS could not be downloaded ({reason}): {remedy}") from error


def load_lpips(backbone=None, device="cpu"):
    """LPIPS on `device`; None and a line on stderr where no file is named and the download fails.

    For tables that can go without LPIPS. A file named (argument or RNG_ALEXNET) must load, else InputError.
    """
    try:
        return LPIPS(backbone).to(device)
    except InputError as error:
        if backbone or os.environ.get("RNG_ALEXNET"):
            raise
        print(f"without LPIPS: {error}", file=sys.stderr)
        return None
