"""The wide mix of training noise, kind by kind: mean, variance, correlation between channels and between
pixels."""

import numpy as np
import pytest

from rng.support import noise

FLAT = np.full((160, 160, 3), 0.5, np.float32)


def correlation(a, b):
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sigma", [0.02, 0.1])
def test_equal_noise_is_white_and_the_same_in_all_channels(sigma, seed):
    added = noise.equal_noise(FLAT, sigma, np.random.default_rng(seed)) - FLAT
    assert np.abs(np.ptp(added, axis=2)).max() < 1e-6 and abs(added.mean()) < sigma / 40
    assert added.std() == pytest.approx(sigma, rel=0.03)
    assert abs(correlation(added[1:], added[:-1])) < 0.03


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("radius", [0.5, 1, 1.5])
def test_grain_keeps_its_strength_and_is_correlated_over_its_radius(radius, colour):
    added = np.stack([noise.grain(FLAT, 0.1, radius, colour, np.random.default_rng(seed)) - FLAT
                      for seed in range(8)])
    assert added.std() == pytest.approx(0.1, rel=0.04) and abs(added.mean()) < 0.003
    window = np.exp(-0.5 * (np.arange(-4, 5) / radius) ** 2)
    expected = (window[1:] * window[:-1]).sum() / (window ** 2).sum()
    assert correlation(added[:, 1:], added[:, :-1]) == pytest.approx(expected, abs=0.03)
    assert correlation(added[:, :, 1:], added[:, :, :-1]) == pytest.approx(expected, abs=0.03)
    assert correlation(added[..., 0], added[..., 2]) == pytest.approx(0 if colour else 1, abs=0.03)


@pytest.mark.parametrize("exposure, shot, read", [(0.5, 0.002, 1e-6), (0.2, 0.01, 1e-5), (0.05, 0.001, 1e-6)])
def test_low_light_has_the_variance_of_shot_and_read_noise(exposure, shot, read):
    dark, noisy = noise.low_light(FLAT, exposure, shot, read, np.random.default_rng(0))
    linear, noisy_linear = (noise.to_linear(z, False) for z in (dark, noisy))
    assert linear.mean() == pytest.approx(exposure * noise.to_linear(FLAT, False).mean(), rel=1e-3)
    assert noisy_linear.var() == pytest.approx(shot * linear.mean() + read, rel=0.05)
    assert noisy_linear.mean() == pytest.approx(linear.mean(), rel=0.02)
    assert abs(correlation(noisy_linear[..., 0], noisy_linear[..., 1])) < 0.03


@pytest.mark.parametrize("kind", noise.KINDS)
def test_each_kind_of_the_wide_mix(kind):
    """In range where it is rounded, clean where it says so, grey in one of eight, a function of its
    generator."""
    clean = np.random.default_rng(1).random((32, 40, 3), np.float32)
    drawn = [noise.wide_mix(clean, np.random.default_rng(seed), kind) for seed in range(160)]
    grey = [np.ptp(target, axis=2).max() < 1e-6 for target, _ in drawn]
    assert 5 <= sum(grey) <= 40
    for (target, noisy), is_grey in zip(drawn, grey):
        assert target.shape == noisy.shape == clean.shape and noisy.dtype == target.dtype == np.float32
        assert np.isfinite(noisy).all() and 0 <= target.min() and target.max() <= 1
        assert not is_grey or np.ptp(noisy, axis=2).max() == 0
        assert is_grey or kind == "dark" or np.array_equal(target, clean)
        assert kind != "clean" or np.abs(noisy - target).max() <= 0.5 / 255 + 1e-6
    rounded = [np.abs(np.rint(noisy * 255) - noisy * 255).max() < 1e-3 for _, noisy in drawn]
    assert 50 <= sum(rounded) and (kind in ("camera", "jpeg") or sum(rounded) <= 110)
    again = noise.wide_mix(clean, np.random.default_rng(3), kind)
    assert np.array_equal(again[1], drawn[3][1])


def test_the_mix_draws_every_kind():
    assert sum(noise.KINDS.values()) == pytest.approx(1)
    differences = [np.abs(np.subtract(*noise.wide_mix(FLAT[:8, :8], np.random.default_rng(seed)))).max()
                   for seed in range(300)]
    unchanged = np.mean([difference < 0.5 / 255 for difference in differences])
    assert 0.06 < unchanged < 0.2  # the clean ones
