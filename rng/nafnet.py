"""r and its loss (Eq. 4): NAFNet (Chen et al., "Simple Baselines for Image Restoration", ECCV 2022).

r is the reconstructive network. Parameters are named as in the official code, so its checkpoints load as is.
"""

import torch
import torch.nn.functional as F
from torch import nn

FEATURE_SCALE = 10  # brings the features that g sees to about unit variance
MARGIN = 16         # pixels of reflection around a patch whose features are asked for


class LayerNorm2d(nn.Module):
    """Normalises each pixel over its channels, (N, C, H, W) -> (N, C, H, W); eps as in the official code."""

    def __init__(self, channels, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x):                  # (N, C, H, W)
        # Channels-last makes both permutes free. float32 is exact, and faster than bfloat16 for few channels.
        x = x.permute(0, 2, 3, 1).float()  # (N, H, W, C)
        x = F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)  # (N, H, W, C)
        return x.permute(0, 3, 1, 2)       # (N, C, H, W) float32


def smooth(h):
    """[1 2 1] / 4 in both directions, (N, C, H, W) -> (N, C, H - 2, W - 2)."""
    return F.avg_pool2d(F.avg_pool2d(h, 2, stride=1), 2, stride=1)


class SimpleGate(nn.Module):
    """NAFNet's only nonlinearity: half of the channels gates the rest, (N, 2C, H, W) -> (N, C, H, W)."""

    def forward(self, x):         # (N, 2C, H, W)
        a, b = x.chunk(2, dim=1)  # (N, C, H, W) each
        return a * b              # (N, C, H, W)


def scaled(conv, scale, y):
    """conv(y) * scale, (N, C, H, W), as one convolution, which saves a pass over memory and its gradient's.

    conv: 1x1, C to C channels. scale: (1, C, 1, 1). y: (N, C, H, W).
    """
    return F.conv2d(y, conv.weight * scale.transpose(0, 1), conv.bias * scale.flatten())


class NAFBlock(nn.Module):
    """Depth-wise convolution, gate, channel attention, then a gated pointwise feed-forward; the shape stays.

    c: channels. beta and gamma start at zero, so a new block is the identity.
    """

    def __init__(self, c):
        super().__init__()
        self.conv1 = nn.Conv2d(c, 2 * c, 1)
        self.conv2 = nn.Conv2d(2 * c, 2 * c, 3, padding=1, groups=2 * c)
        self.conv3 = nn.Conv2d(c, c, 1)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1))  # simplified channel attention
        self.sg = SimpleGate()
        self.conv4 = nn.Conv2d(c, 2 * c, 1)
        self.conv5 = nn.Conv2d(c, c, 1)
        self.norm1 = LayerNorm2d(c)
        self.norm2 = LayerNorm2d(c)
        self.beta = nn.Parameter(torch.zeros(1, c, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, c, 1, 1))

    def forward(self, x):                                       # (N, C, H, W)
        y = self.conv2(self.conv1(self.norm1(x)))               # (N, 2C, H, W)
        y = self.sg(y)                                          # (N, C, H, W)
        x = x + scaled(self.conv3, self.beta, y * self.sca(y))  # (N, C, H, W); sca(y): (N, C, 1, 1)
        y = self.sg(self.conv4(self.norm2(x)))                  # (N, C, H, W), 2C before the gate
        return x + scaled(self.conv5, self.gamma, y)            # (N, C, H, W)


class NAFNet(nn.Module):
    """Noisy image in, clean image out: a U-shaped stack of NAFBlocks around a global residual connection.

    width: channels at full resolution; they double at each of the len(enc) levels.
    enc, dec: blocks per level, the finest first in enc and last in dec. middle: blocks at the coarsest level.
    """

    def __init__(self, width=64, enc=(2, 2, 4, 8), middle=12, dec=(2, 2, 2, 2)):
        super().__init__()
        self.config = {"arch": "nafnet", "width": width, "enc": list(enc), "middle": middle, "dec": list(dec)}
        self.intro = nn.Conv2d(3, width, 3, padding=1)
        self.ending = nn.Conv2d(width, 3, 3, padding=1)
        self.encoders, self.downs = nn.ModuleList(), nn.ModuleList()
        self.ups, self.decoders = nn.ModuleList(), nn.ModuleList()
        c = width
        for blocks in enc:
            self.encoders.append(nn.Sequential(*[NAFBlock(c) for _ in range(blocks)]))
            self.downs.append(nn.Conv2d(c, 2 * c, 2, stride=2))
            c *= 2
        self.middle_blks = nn.Sequential(*[NAFBlock(c) for _ in range(middle)])
        for blocks in dec:
            self.ups.append(nn.Sequential(nn.Conv2d(c, 2 * c, 1, bias=False), nn.PixelShuffle(2)))
            c //= 2
            self.decoders.append(nn.Sequential(*[NAFBlock(c) for _ in range(blocks)]))

    def forward(self, x, features=False):
        """Noisy x (N, 3, H, W), RGB in [0, 1] but for noise, H and W from 1 -> r(x), as large, unclipped.

        features=True, not in the paper, H and W from MARGIN + 1: (N, 3 + C, H, W), after r(x) the C channels
        that the last convolution turns into the correction of x, times FEATURE_SCALE. As they are, they show
        how r calculates: a frame from zero padding, a checkerboard from the pixel shuffles. So r gets x
        extended by MARGIN pixels of reflection, and the channels are smoothed.
        """
        if not features:
            return self._decoded(x)[0]
        y, h = self._decoded(F.pad(x, (MARGIN,) * 4, mode="reflect"))
        y, h = F.pad(y, (-MARGIN,) * 4), smooth(F.pad(h, (1 - MARGIN,) * 4).float())
        return torch.cat([y, FEATURE_SCALE * h], dim=1)                      # (N, 3 + C, H, W)

    def _decoded(self, x):
        """Noisy x (N, 3, H, W) -> r(x) (N, 3, H, W), and what the last convolution reads, (N, C, H, W)."""
        height, width = x.shape[-2:]
        multiple = 2 ** len(self.encoders)
        x = F.pad(x, (0, -width % multiple, 0, -height % multiple))  # (N, 3, H', W'), zeros as the authors do
        h = self.intro(x)                                            # (N, C, H', W'), C = width
        skips = []
        for encoder, down in zip(self.encoders, self.downs):
            h = encoder(h)                                           # (N, C, H', W')
            skips.append(h)
            h = down(h)                                              # (N, 2C, H'/2, W'/2) and so on
        h = self.middle_blks(h)                                      # (N, 16C, H'/16, W'/16) with four levels
        for up, decoder, skip in zip(self.ups, self.decoders, reversed(skips)):
            h = decoder(up(h) + skip)  # (N, 8C, H'/8, W'/8) and so on, to (N, C, H', W')
        y = self.ending(h) + x                                       # (N, 3, H', W')
        return y[..., :height, :width], h[..., :height, :width]


def reconstruction_loss(clean, estimate, kind="mse"):
    """Eq. 4 with p = 2, mean ||y - r(x)||^2; kind "psnr" is NAFNet's own loss, the mean of -PSNR in dB.

    clean, estimate: (N, 3, H, W) in [0, 1]. The floor keeps the logarithm finite; with NAFNet's 1e-8 pictures
    without noise would have a gradient a hundred times that of the others.
    """
    squared = (clean - estimate.float()).square()
    return squared.mean() if kind == "mse" else 10 * torch.log10(squared.mean(dim=(1, 2, 3)) + 1e-5).mean()


def config_from_state_dict(state_dict):
    """An official checkpoint's parameters -> NAFNet's arguments; KeyError if the names are not NAFNet's."""
    def count(prefix):
        return len({int(name[len(prefix):].split(".")[0]) for name in state_dict if name.startswith(prefix)})

    levels = count("downs.")
    return {
        "width": state_dict["intro.weight"].shape[0],
        "enc": [count(f"encoders.{level}.") for level in range(levels)],
        "middle": count("middle_blks."),
        "dec": [count(f"decoders.{level}.") for level in range(levels)],
    }
