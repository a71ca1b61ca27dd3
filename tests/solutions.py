"""Solutions of exercises 1, 4 and 8 of docs/exercises.md. Try them yourself first.

`python -m tests.solutions` measures them with the models that ship, on five photographs (two minutes).
"""

import math

import torch

from rng import metrics, scoring
from rng.controller import STEPS, StepController
from rng.pipeline import RnG
from rng.support import data
from rng.support.images import to_8_bit, to_tensor


def ddim_sample(g, x, schedule, noise):
    """As ddpm.sample, but a step back adds no fresh noise (Song et al., 2021)."""
    d_t, gamma = noise(0), schedule.gamma
    for t in range(len(gamma) - 1, 0, -1):
        eps_hat = g(x, d_t, torch.full((len(x),), gamma[t], dtype=torch.float64)).float()
        d_0 = (d_t - math.sqrt(1 - gamma[t]) * eps_hat) / math.sqrt(gamma[t])
        d_t = math.sqrt(gamma[t - 1]) * d_0 + math.sqrt(1 - gamma[t - 1]) * eps_hat
    return d_t


class DDIM(RnG):
    """Exercise 1."""

    sample = staticmethod(ddim_sample)


class Controller(StepController):
    """Exercise 4: the mean of the step count under s's probabilities, rounded to the nearest class."""

    def predict_steps(self, x):
        """x: noisy patches (N, 3, H, W) in [0, 1] -> (N,) int64."""
        counts = torch.tensor(STEPS, dtype=torch.float32, device=x.device)
        mean = self(x).float().softmax(dim=1) @ counts
        return 10 * (mean / 10).round().long()


def curve(model, lpips, noisy, clean, details=(0, 0.25, 0.5, 0.75, 1), **options):
    """Exercise 8: -> (PSNR, LPIPS) of each detail. noisy, clean: (H, W, 3); options: of RnG.denoise."""
    y, points = to_tensor(to_8_bit(clean))[None], []
    for detail in details:
        y_hat = to_tensor(to_8_bit(model.denoise(noisy, detail=detail, **options)))[None]
        points.append((metrics.psnr(y_hat, y).item(), lpips(y_hat, y).item()))
    return points


def main():
    """Means over the centres of data set "sample", 128 x 128, sigma 25."""
    pairs = [scoring.inputs(item, 25, 128) for item in data.items("sample")]
    lpips = metrics.LPIPS()

    def tell(name, model, **options):
        points = torch.tensor([curve(model, lpips, noisy, clean, **options) for clean, noisy in pairs])
        for (dB, distance), detail in zip(points.mean(dim=0).tolist(), options["details"]):
            print(f"| {name}, detail {detail:g} | {dB:.2f} | {distance:.4f} |")

    print("| method | PSNR | LPIPS |\n|---|---|---|")
    for method in RnG, DDIM:
        model = method.load("paper", schedule=False)
        for steps in 10, 20, 50:
            tell(f"{method.__name__}, {steps} steps", model, steps=steps, details=[1])
    paper = RnG.load("paper")
    tell(f"argmax, {mean_steps(paper, pairs):.1f} steps", paper, details=[1])
    argmax, paper.controller = paper.controller, Controller(paper.controller.config["c"]).eval()
    paper.controller.load_state_dict(argmax.state_dict())
    tell(f"expectation, {mean_steps(paper, pairs):.1f} steps", paper, details=[1])
    for name in "paper", "default":
        tell(name, RnG.load(name), details=[0, 0.25, 0.5, 0.75, 1])


def mean_steps(model, pairs):
    return sum(model.denoise(noisy, parts=True).steps.mean() for _, noisy in pairs) / len(pairs)


if __name__ == "__main__":
    main()
