"""rng/tiling.py against the paper's rule taken literally, pixel by pixel: 256, 32, drop 12, average 8."""

import numpy as np
import pytest
import torch

from helpers import split, stitch
from rng import tiling

CORNERS = [1, 2, 12, 31, 32, 33, 224, 255, 256, 257, 268, 289, 479, 480, 481, 704]
SIZES = [(1, 1), (1, 300), (257, 1), (256, 256), (480, 480), (255, 289), (289, 255), (481, 321), (1000, 4000)]
SIZES += [tuple(int(size) for size in np.random.default_rng(seed).integers(1, 600, 2)) for seed in range(95)]
SIZES += [tuple(int(size) for size in np.random.default_rng(seed).choice(CORNERS, 2)) for seed in range(96)]


def random_image(height, width, channels=1):
    return torch.rand(channels, height, width, generator=torch.Generator().manual_seed(1000 * height + width))


def sides(size):
    """Pixels of the patches along a side: 256 each; the last what is left, a multiple of 16, from 64."""
    patches = next(n for n in range(1, 99) if 224 * n + 32 >= size)
    left = next(n for n in range(64, 257, 16) if 224 * (patches - 1) + n >= size)
    return [256] * (patches - 1) + [left]


def random_patches(height, width, channels=1):
    """Unrelated patches, so that each pixel of the stitched picture tells which patches it came from."""
    whole = random_image(256 * len(sides(height)), 256 * len(sides(width)), channels)
    return [whole[:, 256 * row:, 256 * col:][:, :h, :w] for row, h in enumerate(sides(height))
            for col, w in enumerate(sides(width))]


def weights(size):
    """Share of each patch in each pixel along one side, (patches, extended size), by the paper's words."""
    lengths = sides(size)
    kept = np.zeros((len(lengths), 224 * (len(lengths) - 1) + lengths[-1]))
    for patch, length in enumerate(lengths):
        first, last = 12 if patch > 0 else 0, 256 - 12 if patch < len(lengths) - 1 else length
        kept[patch, 224 * patch + first:224 * patch + last] = 1
    return kept / kept.sum(0)


def literal_stitch(patches, height, width):
    rows, cols = weights(height), weights(width)
    canvas = np.zeros((len(patches[0]), rows.shape[1], cols.shape[1]))
    for (row, col), patch in zip(np.ndindex(len(rows), len(cols)), patches, strict=True):
        (h, w), top, left = patch.shape[1:], 224 * row, 224 * col
        y, x = slice(top, top + h), slice(left, left + w)
        canvas[:, y, x] += rows[row, y, None] * cols[col, x] * patch.double().numpy()
    return canvas[:, :height, :width]


@pytest.mark.parametrize("height, width", SIZES)
def test_stitch_inverts_split_bit_for_bit(height, width):
    image = random_image(height, width)
    patches = split(image)
    assert [patch.shape for patch in patches] == [(1, h, w) for h in sides(height) for w in sides(width)]
    assert tiling.count(height) * tiling.count(width) == len(patches)
    assert torch.equal(stitch(patches, height, width), image)


@pytest.mark.parametrize("height, width", SIZES[::10] + [(200, 100), (704, 704), (257, 257)])
def test_stitch_drops_12_and_averages_8_pixel_for_pixel(height, width):
    patches = random_patches(height, width)
    image = stitch(patches, height, width).numpy()
    assert np.abs(image - literal_stitch(patches, height, width)).max() < 1e-6


def test_corner_where_four_patches_meet():
    one, two, three, four = (torch.full((3, 256, 256), value) for value in (0.0, 1.0, 10.0, 100.0))
    image = stitch([one, two, three, four], 480, 480)[0]
    assert (image[:236, :236] == 0).all() and (image[:236, 244:] == 1).all()
    assert (image[244:, :236] == 10).all() and (image[244:, 244:] == 100).all()
    assert (image[:236, 236:244] == 0.5).all() and (image[236:244, :236] == 5).all()
    assert (image[244:, 236:244] == 55).all() and (image[236:244, 244:] == 50.5).all()
    assert (image[236:244, 236:244] == 111 / 4).all()


@pytest.mark.parametrize("height, width", SIZES[::10])
def test_split_extends_by_reflection(height, width):
    image = random_image(height, width, 3)
    pad = [(0, 224 * (len(sides(size)) - 1) + sides(size)[-1] - size) for size in (height, width)]
    padded = np.pad(image.numpy(), [(0, 0), *pad], mode="reflect")
    for i, patch in enumerate(split(image)):
        y, x = (224 * place for place in divmod(i, tiling.count(width)))
        assert np.array_equal(patch, padded[:, y:y + 256, x:x + 256])


@pytest.mark.parametrize("height, width", SIZES[::20])
def test_band_by_band_is_the_whole(height, width):
    """A picture that is joined as its patches come, as tiling.Seam does: what is finished leaves at once."""
    patches, cols, seam, bands = random_patches(height, width, 2), tiling.count(width), tiling.Seam(-2), []
    for start in range(0, len(patches), cols):
        bands.append(seam.add(tiling.join(patches[start:start + cols], -1)[..., :width]))
        assert sum(band.shape[1] for band in bands) >= 224 * (start // cols)
    image = torch.cat([*bands, seam.tail], 1)
    assert image.shape == (2, len(weights(height)[0]), width)
    assert torch.equal(image[:, :height], stitch(patches, height, width))


def noise_at(key, *place):
    return tiling.NoiseField([place])(key)[0]


@pytest.mark.parametrize("seed", range(4))
def test_noise_of_neighbours_agrees_where_they_overlap(seed):
    key, row, col = np.random.default_rng(seed).integers(0, 50, 3).tolist()
    noise = noise_at(key, seed, row, col)
    assert noise.shape == (3, 256, 256) and noise.dtype == torch.float32
    assert torch.equal(noise[:, :, 224:], noise_at(key, seed, row, col + 1)[:, :, :32])
    assert torch.equal(noise[:, 224:], noise_at(key, seed, row + 1, col)[:, :32])
    assert torch.equal(noise[:, 224:, 224:], noise_at(key, seed, row + 1, col + 1)[:, :32, :32])


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_standard_normal_and_fresh_for_each_argument(seed):
    noise = noise_at(3, seed, 5, 7)
    others = [(3, seed + 1, 5, 7), (4, seed, 5, 7), (3, seed, 6, 7), (3, seed, 5, 8),
              (2, seed + 1, 5, 7), (5, seed, 3, 7), (3, seed, 7, 5), (3, seed, 6, 6)]
    fields = [noise, *(noise.roll(1, dim) for dim in range(3)), *(noise_at(*other) for other in others)]
    for field in fields:  # five standard errors
        assert abs(field.mean()) < 0.012 and abs(field.std() - 1) < 0.009
    assert (noise.abs() > 3).float().mean().item() == pytest.approx(0.0027, abs=6e-4)
    assert all(abs((noise * field)[:, :224, :224].mean()) < 0.015 for field in fields[1:])


def test_noise_is_a_function_of_its_arguments():
    """Not of the order, of the other patches of a call, of the patches' size or of torch's own generator."""
    keys, places = (0, 1, 100), [(0, 0, 0), (7, 1, 0), (2 ** 40, 30, 40)]
    first = [tiling.NoiseField(places)(key) for key in keys]
    tiling.cell_noise.cache_clear()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for i, j in reversed(list(np.ndindex(3, 3))):
        assert torch.equal(noise_at(keys[i], *places[j]), first[i][j])
        assert torch.equal(tiling.NoiseField([places[j]], 240, 64)(keys[i])[0], first[i][j, :, :240, :64])
        assert torch.equal(tiling.NoiseField([places[j]], 500, 9)(keys[i])[0, :, :256], first[i][j, :, :, :9])
    assert torch.equal(torch.get_rng_state(), state)
