"""s, the step controller of Sec. 3.2: gives each noisy patch its number of inverse steps."""

import torch
import torch.nn.functional as F
from torch import nn

STEPS = tuple(range(0, 101, 10))  # the classes: step = [0, 10, ..., 100]


class ConvBlock(nn.Sequential):
    """3x3 convolution, batch normalisation, ReLU."""

    def __init__(self, c_in, c_out):
        super().__init__(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())


class StepController(nn.Module):
    """Eight convolutional blocks, max-pooling after blocks 2, 5, 6 and 8, residual connections 2->4 and 6->8.

    c: channels of the first block. The paper gives the layers but not the widths; its pools and residuals are
    those of the ResNet-9 plan, whose widths are c, 2c | 2c, 2c | 4c | 8c | 8c, 8c with c = 64.
    """

    def __init__(self, c=64):
        super().__init__()
        self.config = {"c": c}
        widths = [3, c, 2 * c, 2 * c, 2 * c, 4 * c, 8 * c, 8 * c, 8 * c]
        self.blocks = nn.ModuleList([ConvBlock(i, o) for i, o in zip(widths[:-1], widths[1:])])
        self.fc = nn.Linear(widths[-1], len(STEPS))

    def forward(self, x):
        """x: noisy patches (N, 3, H, W) in [0, 1], H and W at least 8 -> logits (N, 11)."""
        b1, b2, b3, b4, b5, b6, b7, b8 = self.blocks
        h = F.max_pool2d(b2(b1(x)), 2)       # (N, 2c, H/2, W/2)
        h = h + b4(b3(h))                    # (N, 2c, H/2, W/2)
        h = F.max_pool2d(b5(h), 2)           # (N, 4c, H/4, W/4)
        h = F.max_pool2d(b6(h), 2)           # (N, 8c, H/8, W/8)
        h = h + b8(b7(h))                    # (N, 8c, H/8, W/8)
        h = h.amax(dim=(2, 3))               # (N, 8c), the last max-pooling is global
        return self.fc(h)                    # (N, 11); the softmax is in the cross-entropy

    def predict_steps(self, x):
        """x: noisy patches (N, 3, H, W) in [0, 1] -> the most probable number of steps, (N,) int64."""
        return torch.tensor(STEPS, device=x.device)[self(x).argmax(dim=1)]
