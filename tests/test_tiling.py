"""rng/tiling.py against the paper's rule taken literally, pixel by pixel: 256, 32, drop 12, average 8."""

import numpy as np
import pytest
import torch

from rng import tiling

CORNERS = [1, 2, 12, 31, 32, 33, 224, 255, 256, 257, 268, 289, 479, 480, 481, 704]
SIZES = [(1, 1), (1, 300), (257, 1), (256, 256), (480, 480), (255, 289), (289, 255), (481, 321), (2, 704)]
SIZES += [tuple(int(size) for size in np.random.default_rng(seed).integers(1, 600, 2)) for seed in range(95)]
SIZES += [tuple(int(size) for size in np.random.default_rng(seed).choice(CORNERS, 2)) for seed in range(96)]


def random_image(height, width, channels=1):
    return torch.rand(channels, height, width, generator=torch.Generator().manual_seed(1000 * height + width))


def sides(size):
    """Pixels of each patch along one side: 256 each, for the last what is left, to a multiple of 16, at least 64."""
    patches = 1
    while 224 * patches + 32 < size:
        patches += 1
    left = size - 224 * (patches - 1)
    while left % 16 or left < 64:
        left += 1
    return [256] * (patches - 1) + [left]


def random_patches(height, width, channels=1):
    """Unrelated patches, so that each pixel of the stitched picture tells which patches it came from."""
    generator = torch.Generator().manual_seed(1000 * height + width)
    return [torch.rand(channels, h, w, generator=generator) for h in sides(height) for w in sides(width)]


def weights(size):
    """Share of each patch in each pixel along one side, (patches, extended size), by the paper's words alone."""
    lengths = sides(size)
    share = np.zeros((len(lengths), 224 * (len(lengths) - 1) + lengths[-1]))
    for pixel in range(share.shape[1]):
        keepers = []
        for patch, length in enumerate(lengths):
            place = pixel - 224 * patch
            inside = 0 <= place < length
            dropped = place < 12 and patch > 0 or place >= 256 - 12 and patch < len(lengths) - 1
            if inside and not dropped:
                keepers.append(patch)
        share[keepers, pixel] = 1 / len(keepers)
    return share


def literal_stitch(patches, height, width):
    rows, cols = weights(height), weights(width)
    canvas = np.zeros((len(patches[0]), rows.shape[1], cols.shape[1]))
    for i, patch in enumerate(patches):
        row, col = divmod(i, len(cols))
        (h, w), top, left = patch.shape[1:], 224 * row, 224 * col
        y, x = slice(top, top + h), slice(left, left + w)
        canvas[:, y, x] += rows[row, y, None] * cols[col, x] * patch.double().numpy()
    return canvas[:, :height, :width]


@pytest.mark.parametrize("height, width", SIZES)
def test_stitch_inverts_split_bit_for_bit(height, width):
    image = random_image(height, width)
    patches = tiling.split(image)
    assert [patch.shape for patch in patches] == [(1, h, w) for h in sides(height) for w in sides(width)]
    assert torch.equal(tiling.stitch(patches, height, width), image)


@pytest.mark.parametrize("size", CORNERS + [1000, 4000])
def test_count_is_the_fewest_patches_that_cover(size):
    assert tiling.count(size) == len(weights(size))


def test_weights_say_what_the_paper_says():
    share = weights(480)
    assert (share[0] == [1] * 236 + [0.5] * 8 + [0] * 236).all() and (share.sum(0) == 1).all()


@pytest.mark.parametrize("height, width", SIZES[::10] + [(704, 704), (256, 700), (700, 256), (257, 257)])
def test_stitch_drops_12_and_averages_8_pixel_for_pixel(height, width):
    patches = random_patches(height, width)
    assert np.abs(tiling.stitch(patches, height, width).numpy() - literal_stitch(patches, height, width)).max() < 1e-6


def test_corner_where_four_patches_meet():
    one, two, three, four = (torch.full((3, 256, 256), value) for value in (0.0, 1.0, 10.0, 100.0))
    image = tiling.stitch([one, two, three, four], 480, 480)[0]
    assert (image[:236, :236] == 0).all() and (image[:236, 244:] == 1).all()
    assert (image[244:, :236] == 10).all() and (image[244:, 244:] == 100).all()
    assert (image[:236, 236:244] == 0.5).all() and (image[236:244, :236] == 5).all()
    assert (image[244:, 236:244] == 55).all() and (image[236:244, 244:] == 50.5).all()
    assert (image[236:244, 236:244] == 111 / 4).all()


@pytest.mark.parametrize("height, width", SIZES[::20] + [(1, 1), (200, 100)])
def test_pictures_own_borders_are_kept_whole(height, width):
    patches = random_patches(height, width)
    image = tiling.stitch(patches, height, width)
    assert torch.equal(image[:, :12, :12], patches[0][:, :min(12, height), :min(12, width)])
    last = patches[-1][:, :height - 224 * (tiling.count(height) - 1), :width - 224 * (tiling.count(width) - 1)]
    assert torch.equal(image[:, -1:, -1:], last[:, -1:, -1:])


@pytest.mark.parametrize("height, width", SIZES[::10])
def test_split_extends_by_reflection(height, width):
    image = random_image(height, width, 3)
    extended = [224 * (len(sides(size)) - 1) + sides(size)[-1] for size in (height, width)]
    pad = ((0, 0), (0, extended[0] - height), (0, extended[1] - width))
    padded = np.pad(image.numpy(), pad, mode="reflect")
    for i, patch in enumerate(tiling.split(image)):
        y, x = (224 * place for place in divmod(i, tiling.count(width)))
        assert np.array_equal(patch, padded[:, y:y + 256, x:x + 256])


@pytest.mark.parametrize("height, width", SIZES[::20])
def test_band_by_band_is_the_whole(height, width):
    patches = random_patches(height, width, 2)
    arrived, cols = [], tiling.count(width)

    def rows():
        for start in range(0, len(patches), cols):
            arrived.append(patches[start:start + cols])
            yield arrived[-1]

    bands, waiting = [], []
    for band in tiling.stitch_rows(rows(), width):
        bands.append(band)
        waiting.append(len(arrived) * 224 - sum(band.shape[1] for band in bands))
    image = torch.cat(bands, 1)
    assert image.shape == (2, len(weights(height)[0]), width)
    assert torch.equal(image[:, :height], tiling.stitch(patches, height, width))
    assert max(waiting) <= 256  # bands leave as soon as they are finished


@pytest.mark.parametrize("seed", range(4))
def test_noise_of_neighbours_agrees_where_they_overlap(seed):
    key, row, col = (int(i) for i in np.random.default_rng(seed).integers(0, 50, 3))
    noise = tiling.patch_noise(seed, key, row, col)
    assert noise.shape == (3, 256, 256) and noise.dtype == torch.float32
    assert torch.equal(noise[:, :, 224:], tiling.patch_noise(seed, key, row, col + 1)[:, :, :32])
    assert torch.equal(noise[:, 224:], tiling.patch_noise(seed, key, row + 1, col)[:, :32])
    assert torch.equal(noise[:, 224:, 224:], tiling.patch_noise(seed, key, row + 1, col + 1)[:, :32, :32])
    if row and col:
        assert torch.equal(noise[:, :32, :32], tiling.patch_noise(seed, key, row - 1, col - 1)[:, 224:, 224:])


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_standard_normal_and_fresh_for_each_argument(seed):
    noise = tiling.patch_noise(seed, 3, 5, 7)
    others = [(seed + 1, 3, 5, 7), (seed, 4, 5, 7), (seed, 3, 6, 7), (seed, 3, 5, 8),
              (seed + 1, 2, 5, 7), (seed, 5, 3, 7), (seed, 3, 7, 5), (seed, 3, 6, 6)]
    fields = [noise, *(noise.roll(1, dim) for dim in range(3)), *(tiling.patch_noise(*other) for other in others)]
    assert all(abs(field.mean()) < 0.012 and abs(field.std() - 1) < 0.009 for field in fields)  # five standard errors
    assert (noise.abs() > 3).float().mean().item() == pytest.approx(0.0027, abs=6e-4)
    assert all(abs((noise * field)[:, :224, :224].mean()) < 0.015 for field in fields[1:])


def test_noise_is_a_function_of_its_arguments():
    places = [(0, 0, 0, 0), (7, 2, 1, 0), (2 ** 40, 100, 30, 40)]
    state = torch.get_rng_state()
    first = [tiling.patch_noise(*place) for place in places]
    tiling.cell_noise.cache_clear()
    torch.manual_seed(1)
    again = [tiling.patch_noise(*place) for place in reversed(places)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    torch.set_rng_state(state)
    tiling.patch_noise(1, 2, 3, 4)
    assert torch.equal(torch.get_rng_state(), state)


# Fading between the patches' details.

@pytest.mark.parametrize("seed", range(20))
def test_fade_agrees_where_patches_overlap(seed):
    random = np.random.default_rng(seed)
    values = random.random(random.integers(1, 5, 2))
    whole = np.full([tiling.STRIDE * n + tiling.OVERLAP for n in values.shape], np.nan)
    for row, col in np.ndindex(values.shape):
        here = whole[row * tiling.STRIDE:, col * tiling.STRIDE:][:tiling.PATCH, :tiling.PATCH]
        patch = tiling.fade(values, row, col)
        assert patch.dtype == np.float32 and values.min() - 1e-6 <= patch.min() <= patch.max() <= values.max() + 1e-6
        np.testing.assert_allclose(patch[128, 128], values[row, col], rtol=1e-6)
        np.testing.assert_allclose(patch[np.isfinite(here)], here[np.isfinite(here)], atol=1e-6)
        here[:] = patch
        np.testing.assert_array_equal(tiling.fade(values, row, col, 80, 64), patch[:80, :64])
        for there in ((row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1)):
            if 0 <= min(there) and there[0] < values.shape[0] and there[1] < values.shape[1]:
                rows, cols = (slice(224 if b > a else 0, 256 if b >= a else 32) for a, b in zip((row, col), there))
                assert patch[rows, cols].max() <= min(values[row, col], values[there]) + 1e-6
    largest_slope = np.ptp(values) / tiling.FADE
    for axis in (0, 1):
        assert np.abs(np.diff(whole, axis=axis)).max() <= largest_slope + 1e-6


@pytest.mark.parametrize("value", [0, 0.4, 1, 2])
def test_fade_of_equal_values_is_that_value(value):
    assert (tiling.fade(np.full((3, 2), value), 1, 1) == np.float32(value)).all()
