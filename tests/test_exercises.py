"""Accepts solutions of docs/exercises.md: ours (tests/solutions.py), or yours with --solution FILE.

A file gives its solutions the names below; exercises without one are skipped. docs/walk.md's Python runs too.
"""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import solutions
from helpers import write_random_alexnet
from rng import ddpm, metrics
from rng.controller import StepController
from rng.folder import GenSettings
from rng.pipeline import RnG
from rng.unet import UNet

TEXT = (Path(__file__).parent.parent / "docs" / "exercises.md").read_text()
START, *SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def solution(request):
    """solution(name): the reader's, else ours; skips the test if there is none."""
    path = request.config.getoption("--solution")
    theirs = runpy.run_path(path) if path else vars(solutions)

    def find(name):
        if name not in theirs:
            pytest.skip(f"no {name} in {path or 'tests/solutions.py'}: yours to write")
        return theirs[name]

    return find


class Knows(nn.Module):
    """A g that knows the residual it should generate, and counts its calls."""

    def __init__(self, d_0):
        super().__init__()
        self.d_0, self.calls = d_0, 0

    def forward(self, x, d_t, gamma):
        self.calls += 1
        gamma = gamma[:, None, None, None]
        return ((d_t - gamma.sqrt() * self.d_0) / (1 - gamma).sqrt()).float()


def knowing(kind, seed):
    """(a model of this class that knows the truth, a picture, what it should make of it)."""
    generator = np.random.default_rng(seed)
    d_0 = torch.from_numpy(generator.standard_normal((1, 3, 64, 64)))
    image = generator.uniform(0.3, 0.7, (64, 64, 3)).astype(np.float32)
    model = kind(nn.Identity(), Knows(d_0), GenSettings(residual_scale=20.0), device="cpu",
                 precision="float32")
    return model, image, (image + d_0[0].permute(1, 2, 0).numpy() / 20).clip(0, 1)


def untrained(kind, controller=None):
    torch.manual_seed(0)
    g = UNet(4, blocks=1)
    nn.init.normal_(g.ending.weight, std=0.1)  # it starts at zero, and would not see its input
    return kind(nn.Identity(), g, GenSettings(residual_scale=1000.0), controller, device="cpu",
                precision="float32")


@pytest.mark.parametrize("steps", [0, 1, 2, 10, 50])
@pytest.mark.parametrize("seed", range(3))
def test_1_ddim_returns_what_a_perfect_network_knows(solution, steps, seed):
    model, image, expected = knowing(solution("DDIM"), seed)
    assert np.abs(model.denoise(image, steps) - (expected if steps else image)).max() < 1e-4


def test_1_ddim_adds_no_fresh_noise(solution):
    keys, noise = [], torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model, schedule = untrained(solution("DDIM")), ddpm.linear_schedule(5, 0.5)
    model.sample(model.g, torch.rand(1, 3, 16, 16), schedule, lambda key: keys.append(key) or noise)
    assert keys == [0]


@pytest.mark.parametrize("side", [64, 100])
def test_2_r_keeps_the_shape(solution, side):
    r = solution("R")().eval()
    x = torch.rand(2, 3, side, side)
    with torch.no_grad():
        assert r(x).shape == x.shape and torch.isfinite(r(x)).all()
    assert RnG(r, device="cpu").denoise(np.full((side, side, 3), 128, np.uint8), 0).shape == (side, side, 3)


@pytest.mark.parametrize("sigma", [5, 25, 50])
def test_3_noise_has_no_mean_and_its_sigma(solution, sigma):
    add, grey = solution("noise"), np.full((256, 256, 3), 0.5, np.float32)
    n, again = (add(grey, sigma / 255, np.random.default_rng(0)) - grey for _ in range(2))
    assert n.shape == grey.shape and n.dtype == np.float32 and np.array_equal(n, again)
    assert abs(n.mean()) < 0.3 * sigma / 255 and 0.8 < n.std() / (sigma / 255) < 1.2


@pytest.mark.parametrize("seed", range(5))
def test_4_a_controller_that_is_sure_says_its_argmax(solution, seed):
    torch.manual_seed(seed)
    s = solution("Controller")(4).eval()
    s.fc.weight.data *= 1e6
    x = torch.rand(8, 3, 32, 32)
    assert torch.equal(s.predict_steps(x), StepController.predict_steps(s, x))


def test_4_undecided_between_0_and_100_it_says_50(solution):
    s = solution("Controller")(4).eval()
    nn.init.zeros_(s.fc.weight)
    s.fc.bias.data = torch.tensor([20.0] + [0.0] * 9 + [20.0])
    assert StepController.predict_steps(s, torch.rand(1, 3, 32, 32)).tolist() == [0]
    image = np.random.default_rng(0).random((64, 64, 3), np.float32)
    assert untrained(RnG, s).denoise(image, parts="steps").steps.tolist() == [[50]]


def test_5_condition_has_the_channels_that_g_takes(solution):
    model = untrained(solution("Condition"))
    x, y_r = torch.rand(2, 2, 3, 32, 32)
    assert model.condition(x, y_r).shape == (2, 3 * model.gen.config["conditions"], 32, 32)
    assert not torch.equal(model.condition(x, y_r), x)


def test_6_the_distilled_sampler_calls_g_four_times_at_most(solution):
    model, image, expected = knowing(solution("Distilled"), 0)
    assert np.abs(model.denoise(image, 100) - expected).max() < 1e-4 and model.gen.calls <= 4


def test_7_guidance_of_1_is_the_model_itself(solution):
    image = np.random.default_rng(0).random((64, 64, 3), np.float32)
    plain, guided = untrained(RnG), untrained(solution("Guided"))
    guided.guidance = 1.0
    assert np.abs(guided.denoise(image, 3) - plain.denoise(image, 3)).max() < 1e-6
    guided.guidance = 2.0
    assert np.abs(guided.denoise(image, 3) - plain.denoise(image, 3)).max() > 1e-5


def test_8_the_curve_starts_at_r_and_ends_at_all_detail(solution, tmp_path):
    model, clean = untrained(RnG), np.random.default_rng(0).random((64, 64, 3), np.float32)
    noisy, lpips = (clean + 0.1).astype(np.float32), metrics.LPIPS(write_random_alexnet(tmp_path / "a.npz"))
    points = solution("curve")(model, lpips, noisy, clean, steps=3)
    ends = [solution("curve")(model, lpips, noisy, clean, details=[detail], steps=3)[0] for detail in (0, 1)]
    assert len(points) >= 3 and [points[0], points[-1]] == ends and ends[0] != ends[1]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_the_python_of_the_exercises_runs(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(START + snippet, {})


def test_the_walk_prints_what_it_says(tmp_path, monkeypatch, capsys):
    """The same lines, with the same shapes; its numbers are rounded differently by other processors."""
    text = (Path(__file__).parent.parent / "docs" / "walk.md").read_text()
    code, printed = re.search(r"```python\n(.*?)```.*?```\n(.*?)```", text, re.DOTALL).groups()
    assert len(code.splitlines()) <= 40
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    names = [line.split("  mean")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [line.split("  mean")[0] for line in printed.splitlines()]
    assert (tmp_path / "walk.png").is_file()
