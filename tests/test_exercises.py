"""Solutions of two exercises of docs/exercises.md, with no change to rng/, and its Python for the others."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rng import ddpm
from rng.controller import STEPS, StepController
from rng.folder import GenSettings
from rng.pipeline import RnG
from rng.unet import UNet

TEXT = (Path(__file__).parent.parent / "docs" / "exercises.md").read_text()
START, *SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
WORKS = {  # what the numbers printed must be, by the *It works when* of the exercise
    2: lambda n: n[2] > n[0] > n[8] and n[2] > n[4] > n[6] and n[8] < n[10] < n[12] and max(n[3::2]) < n[1],
    3: lambda n: n[0] < 1e-6,
    5: lambda n: 0.9 < n[0] < 1.1,
    7: lambda n: max(abs(n[0]), abs(n[2]), abs(n[3])) < 0.02,
    8: lambda n: n[0] <= n[2] <= n[4] <= n[6],
}


@pytest.mark.parametrize("number, snippet", list(zip(WORKS, SNIPPETS, strict=True)))
def test_what_a_snippet_prints_is_what_the_text_says(number, snippet, tmp_path, monkeypatch, capsys):
    scores = np.random.default_rng(0).random((6, len(STEPS)))
    (tmp_path / "runs" / "few").mkdir(parents=True)
    (tmp_path / "runs" / "few" / "step_labels.jsonl").write_text(
        "".join(json.dumps({"lpips": row}) + "\n" for row in scores.tolist()))
    monkeypatch.chdir(tmp_path)
    exec(START + snippet, {})
    printed = re.findall(r"-?\d+\.\d*(?:e-?\d+)?", capsys.readouterr().out)
    assert WORKS[number]([float(value) for value in printed])


def ddim_sample(g, x, schedule, noise):
    """Exercise 1: steps back without fresh noise (Song et al., 2021)."""
    d_t, gamma = noise(0), schedule.gamma
    for t in range(len(gamma) - 1, 0, -1):
        eps_hat = g(x, d_t, torch.full((len(x),), gamma[t], dtype=torch.float64)).float()
        d_0 = (d_t - math.sqrt(1 - gamma[t]) * eps_hat) / math.sqrt(gamma[t])
        d_t = math.sqrt(gamma[t - 1]) * d_0 + math.sqrt(1 - gamma[t - 1]) * eps_hat
    return d_t


class DDIM(RnG):
    sample = staticmethod(ddim_sample)


class Knows(nn.Module):
    """A g that knows the residual it should generate."""

    def __init__(self, d_0):
        super().__init__()
        self.d_0 = d_0

    def forward(self, x, d_t, gamma):
        gamma = gamma[:, None, None, None]
        return ((d_t - gamma.sqrt() * self.d_0) / (1 - gamma).sqrt()).float()


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("seed", range(3))
def test_ddim_returns_what_a_perfect_network_knows(steps, seed):
    generator = np.random.default_rng(seed)
    d_0 = torch.from_numpy(generator.standard_normal((1, 3, 64, 64)))
    settings = GenSettings(residual_scale=20.0)
    model = DDIM(nn.Identity(), Knows(d_0), settings, device="cpu", precision="float32")
    image = generator.uniform(0.3, 0.7, (64, 64, 3)).astype(np.float32)
    expected = image + d_0[0].permute(1, 2, 0).numpy() / 20
    assert np.abs(model.denoise(image, steps) - expected.clip(0, 1)).max() < 1e-4


class Expectation(StepController):
    """Exercise 4: the mean of the step count under s's probabilities, rounded to the nearest class."""

    def predict_steps(self, x):
        counts = torch.tensor(STEPS, dtype=torch.float32, device=x.device)
        mean = self(x).float().softmax(dim=1) @ counts
        return 10 * (mean / 10).round().long()


@pytest.mark.parametrize("seed", range(5))
def test_expectation_of_a_controller_that_is_sure_is_its_argmax(seed):
    torch.manual_seed(seed)
    s = Expectation(4).eval()
    s.fc.weight.data *= 1e6
    x = torch.rand(8, 3, 32, 32)
    assert torch.equal(s.predict_steps(x), StepController.predict_steps(s, x))


def test_expectation_between_0_and_100_is_50():
    s = Expectation(4).eval()
    nn.init.zeros_(s.fc.weight)
    s.fc.bias.data = torch.tensor([20.0] + [0.0] * 9 + [20.0])
    g, settings = UNet(4, blocks=1), GenSettings(residual_scale=1000.0)  # an untrained g makes large d_0
    model = RnG(nn.Identity(), g, settings, s, device="cpu")
    assert StepController.predict_steps(s, torch.rand(1, 3, 32, 32)).tolist() == [0]
    parts = model.denoise(np.random.default_rng(0).random((64, 64, 3), np.float32), parts=True)
    assert parts.steps.tolist() == [[50]] and ddpm.default_end(50) == 0.4
