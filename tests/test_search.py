"""rng.search: with a g and a judge whose answer can be worked out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rng import ddpm
from rng.controller import STEPS
from rng.search import search

ENDS, DETAILS = [0.1, 0.3, 0.7], [0.5, 1.0]


def judge(y_hat, y):
    return (y_hat - y).abs().mean(dim=(1, 2, 3))


def model_of(adds):
    """A stand-in for RnG that adds adds(steps, end), one number for each patch, to r(x) = x."""
    model = SimpleNamespace(ends={}, details={}, settings={"train_end": 0.006}, device=torch.device("cpu"), reconstruct=lambda x: x)
    model.generate = lambda x, y_r, steps, noise: torch.ones_like(x) * adds(steps[0], model.ends[steps[0]])[:, None, None, None]
    return model


@pytest.mark.parametrize("seed", range(20))
def test_the_lowest_of_everything_tried_is_chosen(seed):
    table = {}

    def adds(steps, end):
        return table.setdefault((steps, end), torch.rand(4, generator=torch.Generator().manual_seed(len(table) + 99 * seed)))

    model = model_of(adds)
    x, y = torch.full((4, 3, 8, 8), 0.2), torch.rand(4, generator=torch.Generator().manual_seed(seed))[:, None, None, None].expand(4, 3, 8, 8)
    for steps, tried, chosen, values in search(model, judge, x, y, ENDS, {steps: DETAILS for steps in STEPS}):
        if not steps:
            torch.testing.assert_close(values, judge(x, y))
            continue
        gammas = {end: ddpm.linear_schedule(steps, end).gamma[-1] for end in ENDS}
        allowed = [end for end in ENDS if ddpm.linear_schedule(2000, 0.006).gamma[-1] <= gammas[end] <= 0.1] or [0.1]
        assert sorted(tried) == allowed
        scores = {(end, detail): judge((x + detail * adds(steps, end)[:, None, None, None]).clamp(0, 1), y)
                  for end in allowed for detail in DETAILS}
        best = min(scores, key=lambda key: scores[key].mean())
        assert (chosen, tried[chosen][1]) == best == (model.ends[steps], model.details[steps])
        np.testing.assert_allclose(tried[chosen][0], scores[best].mean().item(), rtol=1e-6)
        torch.testing.assert_close(values, scores[best])
