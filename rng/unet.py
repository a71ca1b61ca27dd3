"""g, the generative network: the conditional U-Net of ref. [47] (Whang et al., 2022). Also Table 1's r."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from rng import ddpm
from rng.nafnet import smooth

NEAR = 12      # pixels to each side that detail_kept looks at: what tiling drops of a patch's border
QUIET = 0.015  # noise, in [0, 1] units, below which there is less detail: r cannot have lost what it left


def noise_level_embedding(gamma, dim):
    """Sinusoidal embedding of the noise level, as in WaveGrad (ref. [13]): sin and cos of 5000 sqrt(gamma).

    Wavelengths run from 2 pi to 10,000 times that, as in the Transformer's embedding of positions.
    gamma: (N,) float64 in [0, 1] -> (N, dim) float32. Never in bfloat16, which turns 0.999 into 1.
    """
    position = 5000 * gamma.double().sqrt()                                   # (N,)
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=gamma.device) / (dim // 2))
    angle = position[:, None] * frequency.double()                            # (N, dim / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()               # (N, dim)


def condition(kind, x, y_r, features=None):
    """What g sees: "noisy" x (the paper), "initial" r(x) (Table 1), "both", or these and r's "features".

    x, y_r = r(x): (N, 3, H, W). features: (N, C, H, W), as from NAFNet. -> (N, 3, 6 or 6 + C, H, W).
    """
    seen = {"noisy": [x], "initial": [y_r], "both": [x, y_r], "features": [x, y_r, features]}[kind]
    return torch.cat(seen, dim=1)


def detail_kept(x, y_r):
    """The share of d_0 that a g with residual=True keeps at each pixel; not in the paper.

    min(1, gradient of r(x) / noise^2, noise / QUIET), averaged over the 25 x 25 pixels around, with x - r(x)
    as the noise. Where r(x) is even and the noise strong, x does not tell whether there was detail, and a
    wrong guess costs more LPIPS than a right one gains.

    x, y_r = r(x): (N, 3, H, W) in [0, 1] -> (N, 1, H, W) in [0, 1].
    """
    def near(z):
        z = F.pad(z.mean(dim=1, keepdim=True), (NEAR,) * 4, mode="replicate")  # (N, 1, H + 24, W + 24)
        rows = F.avg_pool2d(z, (2 * NEAR + 1, 1), stride=1)                   # (N, 1, H, W + 24)
        return F.avg_pool2d(rows, (1, 2 * NEAR + 1), stride=1)                # (N, 1, H, W)

    y_r = y_r.float()
    right, below = F.pad(y_r, (0, 1, 0, 0), mode="replicate"), F.pad(y_r, (0, 0, 0, 1), mode="replicate")
    gradient = (right.diff(dim=3).abs() + below.diff(dim=2).abs()) / 2        # (N, 3, H, W)
    square = near((x - y_r).square())                                         # (N, 1, H, W)
    return torch.minimum(near(gradient) / square.clamp_min(1e-12), square.sqrt() / QUIET).clamp_max(1)


class EdgeConv(nn.Conv2d):
    """A 3 x 3 convolution that repeats the picture's edge; padding_mode="replicate" would leave bfloat16."""

    def forward(self, h):                                                     # (N, C_in, H, W)
        h = torch.cat([h[:, :, :1], h, h[:, :, -1:]], dim=2)
        return super().forward(torch.cat([h[..., :1], h, h[..., -1:]], dim=3))  # (N, C_out, H, W)


class ResBlock(nn.Module):
    """Two SiLU convolutions around a skip connection; the noise level scales and shifts between them."""

    def __init__(self, c_in, c_out, embedding, conv):
        super().__init__()
        self.conv1, self.conv2 = conv(c_in, c_out, 3), conv(c_out, c_out, 3)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.level = nn.Linear(embedding, 2 * c_out) if embedding else None

    def forward(self, h, level):  # (N, C_in, H, W), (N, E) or None
        y = self.conv1(F.silu(h))                                             # (N, C_out, H, W)
        if self.level is not None:
            scale, shift = self.level(level)[:, :, None, None].chunk(2, dim=1)  # (N, C_out, 1, 1) each
            y = y * (1 + scale) + shift                                       # (N, C_out, H, W)
        return self.skip(h) + self.conv2(F.silu(y))                           # (N, C_out, H, W)


class UNet(nn.Module):
    """Fully convolutional U-Net without attention or normalisation.

    base: channels at full resolution. multipliers: of base, one per level. blocks: residual blocks per level.
    conditions: images the network is conditioned on, concatenated (1: x or r(x), 2: both).
    noise_level=True is g: forward(x, d_t, gamma) -> predicted noise, zero at the start of training.
    residual=True is a g for rng/finish.py: its last layer gives d_0, and detail_kept says how much stays. It
    has two conditions and r's features, this many channels, and convolutions repeat the picture's edge (zeros
    there would teach g a frame). softness, 0 in training: the share of its d_0 that is smoothed.
    noise_level=False is Table 1's reconstructive U-Net: forward(x) -> x + correction, first the identity.
    """

    def __init__(self, base=64, multipliers=(1, 2, 3, 4), blocks=3, conditions=1, noise_level=True,
                 residual=False, features=0, softness=0.0):
        super().__init__()
        self.config = {"arch": "unet", "base": base, "multipliers": list(multipliers), "blocks": blocks,
                       "conditions": conditions, "noise_level": noise_level, "residual": residual,
                       "features": features, "softness": softness}
        self.base, self.noise_level, self.residual, self.softness = base, noise_level, residual, softness
        conv = EdgeConv if residual else functools.partial(nn.Conv2d, padding=1)
        block = functools.partial(ResBlock, conv=conv)
        embedding = 4 * base if noise_level else 0  # as wide as DDPM's
        if noise_level:
            self.mlp = nn.Sequential(nn.Linear(base, embedding), nn.SiLU(), nn.Linear(embedding, embedding),
                                     nn.SiLU())
        channels = [base * m for m in multipliers]
        self.intro = conv(3 * conditions + features + 3 * noise_level, base, 3)
        self.encoders, self.downs = nn.ModuleList(), nn.ModuleList()
        self.ups, self.decoders = nn.ModuleList(), nn.ModuleList()
        for c, c_next in zip(channels[:-1], channels[1:]):
            self.encoders.append(nn.ModuleList([block(c, c, embedding) for _ in range(blocks)]))
            self.downs.append(conv(c, c_next, 3, stride=2))
        self.middle = nn.ModuleList([block(channels[-1], channels[-1], embedding)
                                     for _ in range(2 * blocks)])  # cheap there
        for c, c_next in zip(channels[-2::-1], channels[:0:-1]):
            self.ups.append(conv(c_next, c, 3))
            self.decoders.append(nn.ModuleList(
                [block(2 * c if i == 0 else c, c, embedding) for i in range(blocks)]))
        self.ending = conv(base, 3, 3)
        nn.init.zeros_(self.ending.weight)
        nn.init.zeros_(self.ending.bias)

    def forward(self, x, d_t=None, gamma=None):
        """x: images in [0, 1] and features, (N, 3 * conditions + features, H, W), as `condition` gives them.

        d_t: (N, 3, H, W) of unit variance. gamma: (N,) float64.
        Returns (N, 3, H, W): the noise in d_t (Eq. 2's g), or the clean image where noise_level is off.
        """
        height, width = x.shape[-2:]
        h = torch.cat([x, d_t], dim=1) if self.noise_level else x             # (N, C_in, H, W)
        multiple = 2 ** len(self.downs)                                       # 8 with four levels
        h = F.pad(h, (0, -width % multiple, 0, -height % multiple), mode="replicate")  # (N, ., H', W')
        level = self.mlp(noise_level_embedding(gamma, self.base)) if self.noise_level else None  # (N, E)
        h = self.intro(h)                                                     # (N, C, H', W'), C = base
        skips = []
        for encoder, down in zip(self.encoders, self.downs):
            for block in encoder:
                h = block(h, level)                                           # (N, C, H', W')
            skips.append(h)
            h = down(h)                                                       # (N, 2C, H'/2, W'/2) and so on
        for block in self.middle:
            h = block(h, level)  # (N, 4C, H'/8, W'/8) with four levels
        for up, decoder, skip in zip(self.ups, self.decoders, reversed(skips)):
            h = torch.cat([up(F.interpolate(h, scale_factor=2.0)), skip], dim=1)  # (N, 6C, H'/4, W'/4) ...
            for block in decoder:
                h = block(h, level)                                           # (N, 3C, H'/4, W'/4) and so on
        out = self.ending(F.silu(h))[..., :height, :width]                    # (N, 3, H, W)
        if self.residual:
            out = out.float()
            out = torch.lerp(out, smooth(F.pad(out, (1,) * 4, mode="replicate")), self.softness)
            out = detail_kept(x[:, :3], x[:, 3:6]) * out                      # (N, 3, H, W), d_0
            return ddpm.noise_in(d_t, out, gamma)
        return out if self.noise_level else x + out
