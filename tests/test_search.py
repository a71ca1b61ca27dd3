"""rng.search: with a g and a judge whose answer can be worked out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rng import ddpm
from rng.search import search

ENDS, DETAILS = [0.1, 0.3, 0.7], [0.5, 1.0]


def judge(y_hat, y):
    return (y_hat - y).abs().mean(dim=(1, 2, 3))


def model_of(adds):
    """A stand-in for RnG that adds adds(steps, end), one number for each patch, to r(x) = x."""
    model = SimpleNamespace(ends={}, details={}, settings={"train_end": 0.006}, device=torch.device("cpu"), reconstruct=lambda x: x)
    model.generate = lambda x, y_r, steps, noise: torch.ones_like(x) * adds(steps[0], model.ends[steps[0]])[:, None, None, None]
    return model


@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_the_lowest_of_everything_tried_is_chosen(seed, complement):
    table = {}

    def adds(steps, end):
        return table.setdefault((steps, end), torch.rand(4, generator=torch.Generator().manual_seed(len(table) + 99 * seed)))

    model = model_of(adds)
    x, y = torch.full((4, 3, 8, 8), 0.2), torch.rand(4, generator=torch.Generator().manual_seed(seed))[:, None, None, None].expand(4, 3, 8, 8)
    lowest = None
    for steps, tried, chosen, values in search(model, judge, x, y, ENDS, DETAILS, complement):
        if not steps:
            lowest = judge(x, y)
            torch.testing.assert_close(values, lowest)
            continue
        # end points that start noisier than training are left out, but for the smallest
        allowed = [end for end in ENDS if end == 0.1 or ddpm.linear_schedule(steps, end).gamma[-1] >= ddpm.linear_schedule(2000, 0.006).gamma[-1]]
        assert sorted(tried) == allowed
        scores = {(end, detail): judge((x + detail * adds(steps, end)[:, None, None, None]).clamp(0, 1), y)
                  for end in allowed for detail in DETAILS}
        aims = {key: (score.minimum(lowest) if complement else score).mean().item() for key, score in scores.items()}
        best = min(aims, key=aims.get)
        assert (chosen, tried[chosen][1]) == best == (model.ends[steps], model.details[steps])
        np.testing.assert_allclose(tried[chosen][0], scores[best].mean().item(), rtol=1e-6)
        torch.testing.assert_close(values, scores[best])
        lowest = lowest.minimum(values)


def test_with_complement_a_count_may_help_only_the_patches_that_others_leave():
    """Two patches need nothing, two need 0.2: a little for all is best on average, all for two where s may choose r."""
    def adds(steps, end):
        return torch.tensor([0.05, 0.05, 0.1, 0.1] if end == 0.1 else [0.3, 0.3, 0.2, 0.2])

    x = torch.full((4, 3, 8, 8), 0.3)
    y = x + torch.tensor([0.0, 0.0, 0.2, 0.2])[:, None, None, None]
    for complement, expected in ((False, 0.1), (True, 0.3)):
        chosen = {steps: end for steps, _, end, _ in search(model_of(adds), judge, x, y, [0.1, 0.3], [1.0], complement)}
        assert chosen[10] == expected
