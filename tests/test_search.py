"""rng.search: with a g and a judge whose answer can be worked out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rng import ddpm
from rng.search import search_schedule

ENDS = [0.1, 0.3, 0.7]


def judge(y_hat, y):
    return (y_hat - y).abs().mean(dim=(1, 2, 3))


def model_of(adds):
    """A stand-in for RnG that adds adds(T, end), one number for each patch, to r(x) = x."""
    model = SimpleNamespace(settings=SimpleNamespace(train_end=0.006), device="cpu", reconstruct=lambda x: x)
    model.generate = lambda x, y_r, T, noise: torch.ones_like(x) * adds(T, model.schedules.ends[T])
    return model


@pytest.mark.parametrize("seed", range(20))
def test_the_lowest_of_everything_tried_is_chosen(seed):
    table, generator = {}, torch.Generator().manual_seed(seed)

    def adds(T, end):
        return table.setdefault((T, end), torch.rand(4, 1, 1, 1, generator=generator))

    x, y = torch.full((4, 3, 8, 8), 0.2), torch.rand(4, 1, 1, 1, generator=generator).expand(4, 3, 8, 8)
    for T, tried, chosen, values in search_schedule(model_of(adds), judge, x, y, ENDS):
        if not T:
            torch.testing.assert_close(values, judge(x, y))
            continue
        gammas = {end: ddpm.linear_schedule(T, end).gamma[-1] for end in ENDS}
        least = ddpm.linear_schedule(2000, 0.006).gamma[-1]
        allowed = [end for end in ENDS if least <= gammas[end] <= 0.1] or [0.1]
        assert sorted(tried) == allowed
        scores = {end: judge((x + adds(T, end)).clamp(0, 1), y) for end in allowed}
        best = min(scores, key=lambda key: scores[key].mean())
        assert chosen == best
        np.testing.assert_allclose(tried[chosen], scores[best].mean().item(), rtol=1e-6)
        torch.testing.assert_close(values, scores[best])
