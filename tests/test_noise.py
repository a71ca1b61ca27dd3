"""Noise for training: its strength, its physics, its grain, and nothing else than noise."""

from types import SimpleNamespace

import numpy as np
import pytest

from rng.support.noise import (camera_noise, gaussian_noise, jpeg, noise_levels, quantise, sensor_noise,
                               to_linear, to_srgb)


def picture(seed, height=64, width=64):
    """Smooth colours between 0.25 and 0.75."""
    generator = np.random.default_rng([7, seed])
    y, x = np.mgrid[:height, :width][..., None] / 32
    waves = np.sin(x * generator.uniform(0, 3, 3) + y * generator.uniform(0, 3, 3))
    return (0.5 + 0.25 * waves).astype(np.float32)


def flat(value, size=96):
    return np.full((size, size, 3), value, np.float32)


def lag_correlation(noise):
    noise = noise - noise.mean((0, 1))
    return (noise[:, 1:] * noise[:, :-1]).mean() / (noise**2).mean()


@pytest.fixture
def moderate(monkeypatch):
    """Sensor noise well above the steps of 8 bits that does not clip mid-tones; all else stays random."""
    monkeypatch.setattr("rng.support.noise.noise_levels", lambda rng: (rng.uniform(0.001, 0.01), 1e-4))


@pytest.mark.parametrize("seed", range(20))
def test_gaussian_noise_has_the_std_asked_for_and_no_mean(seed):
    generator = np.random.default_rng(seed)
    sigma = generator.uniform(1, 55) / 255
    clean = generator.random((96, 96, 3), np.float32)
    noisy = gaussian_noise(clean, sigma, generator)
    noise = noisy - clean
    assert noisy.dtype == np.float32 and noisy.shape == clean.shape
    assert noise.std() == pytest.approx(sigma, rel=0.02)        # so it is not clipped
    assert abs(noise.mean()) < 5 * sigma / np.sqrt(noise.size)
    assert abs(lag_correlation(noise)) < 0.03


@pytest.mark.parametrize("seed", range(40))
def test_noise_is_a_function_of_the_generator(seed):
    clean = picture(seed, 32, 40)
    for make in (camera_noise, lambda x, generator: gaussian_noise(x, 0.1, generator)):
        first, again, other = (make(clean, np.random.default_rng(s)) for s in (seed, seed, seed + 1))
        assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 2), (3, 1), (5, 7), (7, 5), (17, 8), (33, 65)])
@pytest.mark.parametrize("seed", range(10))
def test_camera_noise_keeps_shape_type_and_range(shape, seed):
    clean = np.random.default_rng(seed).random((*shape, 3), np.float32).round(seed % 3)  # some black, white
    noisy = camera_noise(before := clean.copy(), np.random.default_rng(seed))
    assert noisy.shape == clean.shape and noisy.dtype == np.float32 and np.array_equal(clean, before)
    assert noisy.min() >= 0 and noisy.max() <= 1


@pytest.mark.parametrize("value", [-0.01, 1.01, 128])
def test_camera_noise_refuses_other_ranges(value):
    with pytest.raises(ValueError):
        camera_noise(flat(value, 8), np.random.default_rng(0))


@pytest.mark.parametrize("tone", [False, True])
def test_tone_curves_are_inverses_and_reach_black_and_white(tone):
    srgb = np.linspace(0, 1, 5001, dtype=np.float32)
    linear = to_linear(srgb, tone)
    assert linear.dtype == np.float32 and (np.diff(linear) > 0).all()
    assert linear[0] == pytest.approx(0, abs=1e-6) and linear[-1] == pytest.approx(1, abs=1e-6)
    assert to_srgb(linear, tone) == pytest.approx(srgb, abs=1e-6)
    assert to_srgb(np.float32([-0.1, 1.1]), tone) == pytest.approx([0, 1], abs=1e-6)
    assert tone or linear[2500] == pytest.approx(0.2140, abs=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_without_sensor_noise_and_jpeg_camera_noise_is_the_identity(seed, monkeypatch):
    monkeypatch.setattr("rng.support.noise.noise_levels", lambda generator: (0, 0))
    monkeypatch.setattr("rng.support.noise.jpeg", lambda image, *how: image)
    clean = np.random.default_rng([1, seed]).random((24, 31, 3), np.float32)
    assert camera_noise(clean, np.random.default_rng(seed)) == pytest.approx(clean, abs=1e-6)


@pytest.mark.parametrize("seed", range(30))
def test_camera_noise_does_not_shift_the_colours_of_mid_tones(seed, moderate):
    clean = picture(seed)
    assert np.abs((camera_noise(clean, np.random.default_rng(seed)) - clean).mean((0, 1))).max() < 2.5 / 255


@pytest.mark.parametrize("seed", range(20))
def test_camera_noise_does_not_shift_edges(seed, moderate):
    clean = flat(0.3, 64)
    clean[:, 32:], clean[40:] = 0.6, 0.7
    noisy, centred = camera_noise(clean, np.random.default_rng(seed)), clean - clean.mean((0, 1))
    fit = [(np.roll(noisy, shift, (0, 1))[4:-4, 4:-4] * centred[4:-4, 4:-4]).mean()
           for shift in ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))]
    assert np.argmax(fit) == 0


@pytest.mark.parametrize("seed", range(30))
def test_camera_noise_is_correlated_in_space(seed, moderate):
    clean = flat(0.5)
    assert lag_correlation(camera_noise(clean, np.random.default_rng(seed)) - clean) > 0.1


@pytest.mark.parametrize("seed", range(20))
def test_sensor_noise_at_its_own_sites_has_the_variance_of_shot_and_read_noise(seed):
    generator = np.random.default_rng(seed)
    shot, read = noise_levels(generator)
    colour, gains = generator.uniform(0.1, 1, 3), generator.uniform(1.2, 2.4, 3)
    linear = np.broadcast_to(colour.astype(np.float32), (192, 192, 3))
    noise = sensor_noise(linear, shot, read, gains, correction=generator.random(), generator=generator)
    expected = np.sqrt(shot * colour / gains + read) * gains
    # A colour's own sites, one or two of the four phases of the tile, are left alone by interpolation.
    phases = np.array([[noise[i::2, j::2, c].std() for i in (0, 1) for j in (0, 1)] for c in range(3)])
    measured = np.abs(phases - expected[:, None]).min(1)
    assert (measured / expected < 0.05).all()


@pytest.mark.parametrize("seed", range(20))
def test_sensor_noise_grows_with_light_and_finished_noise_fades_in_the_highlights(seed):
    linear = [flat(x) for x in (0.02, 0.2, 0.9)]
    noise = [sensor_noise(x, 0.002, 1e-5, (2, 1, 1.6), 0.5, np.random.default_rng(seed)) for x in linear]
    dark, middle, bright = (n.std() for n in noise)
    assert dark < middle < bright   # var = shot * x + read
    assert bright**2 / middle**2 == pytest.approx(0.9 / 0.2, rel=0.05)
    finished = [(to_srgb(x + n, False) - to_srgb(x, False)).std() for x, n in zip(linear, noise)]
    assert finished[0] > finished[1] > finished[2]  # gamma lifts the shadows


@pytest.mark.parametrize("seed", range(10))
def test_sensor_noise_of_the_colours_is_independent_only_with_a_bilinear_demosaicker(seed):
    what = flat(0.3), 0.01, 1e-4, (2, 1, 1.6)
    bilinear, corrected = (sensor_noise(*what, how, np.random.default_rng(seed)) for how in (0, 1))
    assert np.abs(np.corrcoef(bilinear.reshape(-1, 3).T)[0, 1:]).max() < 0.1
    assert np.corrcoef(corrected.reshape(-1, 3).T)[0, 1:].min() > 0.5


@pytest.mark.parametrize("phase", range(2))
@pytest.mark.parametrize("correction", [0, 0.5, 1])
def test_demosaicking_keeps_a_constant_colour_up_to_the_border(phase, correction):
    constant = SimpleNamespace(standard_normal=np.ones, integers=lambda high: phase)
    noise = sensor_noise(flat(0.5, 9), 0, 0.04, np.float32([2, 1, 1.6]), correction, constant)
    assert noise == pytest.approx(flat([0.4, 0.2, 0.32], 9), abs=1e-6)


def test_strengths_reach_from_good_cameras_to_phones():
    clean = picture(0)
    strengths = [255 * (camera_noise(clean, np.random.default_rng(i)) - clean).std() for i in range(300)]
    weak, half, strong = np.percentile(strengths, (5, 50, 98))
    assert weak < 2.5 and 4 < half < 9 and 22 < strong < 45


@pytest.mark.parametrize("seed", range(20))
def test_jpeg_keeps_size_place_and_colours(seed):
    clean, phase = picture(seed, 37, 50), np.random.default_rng(seed).integers(8, size=2)
    result = jpeg(clean, 60 + seed, seed % 3, phase)
    assert result.shape == clean.shape and result.dtype == np.float32
    assert np.abs(result - clean).max() < 0.1 and np.abs((result - clean).mean()) < 0.3 / 255


def test_quantise_keeps_the_levels_of_8_bits_and_clips():
    levels = np.arange(256, dtype=np.float32) / 255
    assert np.array_equal(quantise(levels), levels) and quantise(levels).dtype == np.float32
    assert np.array_equal(quantise(np.float32([-3, -0.001, 1.001, 7])), np.float32([0, 0, 1, 1]))
    image = np.random.default_rng(0).random((100, 100, 3), np.float32)
    assert np.abs(quantise(image) - image).max() <= 0.5 / 255 + 1e-7
