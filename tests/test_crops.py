"""Training crops: sample i of iteration k is a function of (seed, k, i) alone, cut from where it should be.

Most pictures here are maps of themselves: the pixel (n, y, x) is row y, column x of picture n, so that a crop
tells where it comes from.
"""

import functools
import json

import numpy as np
import pytest
import torch
from helpers import same
from PIL import Image

import train_gen
import train_recon
from rng import ddpm, search
from rng.support import crops, data, noise
from rng.support.data import Item
from rng.support.errors import InputError
from rng.support.noise import NoiseMix

SCHEDULE = ddpm.linear_schedule(50, 0.2)
DRAW = functools.partial(train_gen.draw_noise, SCHEDULE)  # gamma and eps of stage 2


def chart(n, height=40, width=50, top=0, left=0):
    """A map of itself, or a part of one: uint8 (height, width, 3)."""
    rows, columns = np.mgrid[top:top + height, left:left + width]
    return np.stack([np.full_like(rows, n), rows, columns], axis=2).astype(np.uint8)


def charts(numbers, **size):
    return [Item(str(n), chart(n, **size)) for n in numbers]


def save_charts(folder, count, side):
    folder.mkdir(exist_ok=True)
    for n in range(count):
        Image.fromarray(chart(n, side, side)).save(folder / f"{n}.png", compress_level=1)
    return folder


def make(sets, weights=None, size=8, batch=6, mix=NoiseMix(((0, 0),)), seed=0, start=0, stop=5, draw=None):
    return crops.Crops(sets, weights or [1] * len(sets), size, batch, mix, seed, start, stop, draw)


def pixels(tensor):
    """(..., 3, H, W) in [0, 1], all of it on multiples of 1/255 -> int (..., H, W, 3)."""
    scaled = tensor.double() * 255
    assert (scaled - scaled.round()).abs().max() < 1e-4
    return scaled.round().int().movedim(-3, -1).numpy()


def numbers(batch):
    """Of which chart each sample of a batch is."""
    return pixels(batch["clean"])[:, 0, 0, 0].tolist()


def eight_ways(picture):
    """All flips and rotations."""
    return [np.rot90(way, quarters) for way in (picture, picture[:, ::-1]) for quarters in range(4)]


@pytest.fixture
def limits(monkeypatch):
    """Sets CACHE_BYTES (-1: not even arrays, which count nothing, are kept), GROUP and REUSE."""
    return lambda **values: [monkeypatch.setattr(crops, name, value) for name, value in values.items()]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("batch", [1, 7, 11])
@pytest.mark.parametrize("workers", range(4))
def test_samples_depend_on_seed_iteration_and_place_alone(workers, batch, limits):
    gen = np.random.default_rng([workers, batch])
    limits(CACHE_BYTES=gen.choice([2 ** 30, -1]), REUSE=3)
    sets = [charts(range(20 * s, 20 * s + gen.integers(1, 9))) for s in range(gen.integers(1, 4))]
    sets += [[Item("pair", chart(0), chart(3))]]
    stream = functools.partial(
        make, sets, gen.uniform(0.2, 3, len(sets)).tolist(), int(gen.integers(5, 16)), batch,
        NoiseMix(((0, 55), (25, 25)), 0.3, 0.5), int(gen.integers(1000)), draw=gen.choice([None, DRAW]))
    first = int(gen.choice([0, 5, 10 ** 6]))
    whole = list(stream(start=first, stop=first + 8))
    assert [len(batch_of_k["clean"]) for batch_of_k in whole] == [batch] * 8
    for k in (0, gen.integers(1, 8)):
        assert same(list(crops.batches(stream(start=first + k, stop=first + 8), workers)), whole[k:])
    for k, i in gen.integers([8, batch], size=(20, 2)):
        sample = {key: value[i] for key, value in whole[k].items() if key != "left_out"}
        assert same(stream(start=0, stop=0).sample(first + int(k), int(i)), sample)


def test_samples_are_independent():
    """At other places, in other iterations, under other seeds, and the pictures of stage 1 are those of
    stage 2. gamma: in [gamma_T, 1], spread as ddpm.draw_gamma does; eps: normal, not the noise again."""
    sets, mix = [charts([1], height=200, width=200)], NoiseMix(((25, 25),))

    def every(key, draw):
        return torch.cat([batch[key] for seed in (0, 1)
                          for batch in make(sets, None, 16, 100, mix, seed, stop=3, draw=draw)])

    gamma, eps, noisy, clean = (every(key, DRAW) for key in ("gamma", "eps", "noisy", "clean"))
    assert torch.equal(noisy, every("noisy", None)) and torch.equal(clean, every("clean", None))
    assert len(clean.unique(dim=0)) > 590 and len(gamma.unique()) == 600
    for values in (eps, noisy - clean, torch.cat([eps, noisy - clean])):
        assert (torch.corrcoef(values.flatten(1)) - torch.eye(len(values))).abs().max() < 0.25
    assert gamma.dtype == torch.float64 and SCHEDULE.gamma[-1] <= gamma.min() and gamma.max() <= 1
    gen, shares = np.random.default_rng(0), np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    expected = np.quantile([ddpm.draw_gamma(SCHEDULE, gen) for _ in range(10000)], shares)
    assert (gamma.numpy()[:, None] <= expected).mean(axis=0) == pytest.approx(shares, abs=0.09)
    assert [(eps ** n).mean().item() for n in (1, 2, 4)] == pytest.approx([0, 1, 3], abs=0.03)


@pytest.mark.parametrize("seed", range(30))
def test_shares_of_a_batch(seed):
    gen = np.random.default_rng(seed)
    count, batch = int(gen.integers(1, 6)), int(gen.integers(1, 40))
    weights = gen.choice([0, 0.5, 1, 2, 7.3], count)
    weights[gen.integers(count)] = 1
    stream = make([charts([10 * s, 10 * s + 1]) for s in range(count)], weights.tolist(), batch=batch, stop=2)
    first, second = (np.bincount(np.array(numbers(one)) // 10, minlength=count) for one in stream)
    assert (first == second).all() and sum(first) == batch and not first[weights == 0].any()
    assert np.abs(first - weights / weights.sum() * batch).max() < 1


@pytest.mark.parametrize("draw", [None, DRAW])
@pytest.mark.parametrize("sigma, camera, clip", [(0, 0, 0), (0, 0, 0.5), (50, 0, 0), (25, 0, 1), (0, 1, 0)])
def test_shape_type_and_range(draw, sigma, camera, clip):
    pairs = [Item("a", chart(0), chart(3))]
    pictures = [Item("b", np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))]
    for batch in make([pictures, pairs], None, 16, 6, NoiseMix(((sigma, sigma),), camera, clip), draw=draw):
        assert batch.keys() == {"name", "left_out", "noisy", "clean", *(["gamma", "eps"] if draw else [])}
        assert set(batch["name"]) == {"a", "b"}
        for key in batch.keys() - {"name", "left_out", "gamma"}:
            assert batch[key].dtype == torch.float32 and batch[key].shape == (6, 3, 16, 16)
            assert batch[key].is_contiguous() and batch[key].isfinite().all()
        clean, noisy = batch["clean"], batch["noisy"]
        assert clean.min() >= 0 and clean.max() <= 1 and clean[:3].max() > 0.98
        inside = noisy.min() >= 0 and noisy.max() <= 1
        assert (noisy.min() < 0 and noisy.max() > 1) if sigma == 50 else inside
        assert sigma or camera or (noisy - clean)[:3].abs().max() < 1e-6
        assert (pixels(noisy[3:]) - pixels(clean)[3:] == (3, 0, 0)).all()    # pairs pass as they are


@pytest.mark.parametrize("seed", range(5))
def test_pairs_stay_aligned_in_all_eight_ways(seed):
    """Both crops are the same piece of the two pictures, turned the same way; places and ways are uniform."""
    height, width, size = *np.random.default_rng(seed).integers(13, 30, 2).tolist(), 10
    items = [Item(str(n), chart(n, height, width), chart(n, height, width) + np.uint8(100)) for n in range(4)]
    found = []
    for batch in make([items], size=size, batch=40, seed=seed, stop=10):
        assert np.array_equal(pixels(batch["noisy"]), pixels(batch["clean"]) + 100)
        for crop in pixels(batch["clean"]):
            n, top, left = crop.min(axis=(0, 1))
            ways = [np.array_equal(way, crop) for way in eight_ways(chart(n, size, size, top, left))]
            assert sum(ways) == 1
            found.append((top, left, ways.index(True)))
    for values, length in zip(np.transpose(found), (height - size + 1, width - size + 1, 8), strict=True):
        assert np.bincount(values) == pytest.approx(np.full(length, 400 / length), abs=100 / length ** 0.5)


@pytest.mark.parametrize("seed", range(20))
def test_small_pictures_are_extended_by_reflection(seed):
    height, width, size = np.random.default_rng(seed).integers([1, 1, 2], 20).tolist()

    def lines(first, length):
        """Which of 0, 1, ..., length - 1, length - 2, ..., 1, 0, 1, ...: on from `first`."""
        i, period = np.arange(first, first + size), max(1, 2 * (length - 1))
        return np.minimum(i % period, -i % period)

    batch = next(iter(make([charts([9], height=height, width=width)], size=size, batch=20)))
    for crop in pixels(batch["clean"]):
        rows, columns = lines(crop[..., 1].min(), height), lines(crop[..., 2].min(), width)
        assert any(np.array_equal(way, crop) for way in eight_ways(chart(9)[rows][:, columns]))


@pytest.fixture
def decoded(monkeypatch):
    """Names of the items read so far, in order."""
    names, read = [], Item.read
    monkeypatch.setattr(Item, "read", lambda item: names.append(item.name) or read(item))
    return names


@pytest.mark.parametrize("seed", range(20))
def test_every_picture_once_a_pass(seed, decoded):
    gen = np.random.default_rng(seed)
    length, batch = int(gen.integers(1, 30)), int(gen.integers(1, 12))
    start = int(gen.integers(4)) * length   # iterations after which a pass ends; three passes follow
    stream = make([charts(range(length))], None, 4, batch, seed=seed, start=start, stop=start + 3 * length)
    seen = np.reshape([n for batch in stream for n in numbers(batch)], (3 * batch, length))
    assert (np.sort(seen, axis=1) == np.arange(length)).all()
    assert length < 6 or len({tuple(order) for order in seen.tolist()}) == 3 * batch   # shuffled anew
    assert sorted(decoded) == sorted(map(str, range(length)))                           # once, then kept


@pytest.mark.parametrize("batch, length, group, reuse", [
    (16, 40, 16, 9), (6, 9, 16, 5), (24, 30, 4, 7), (10, 7, 3, 4), (5, 2, 4, 6), (1, 5, 9, 3), (7, 11, 3, 1)])
def test_a_set_too_large_to_keep(batch, length, group, reuse, decoded, limits, tmp_path):
    """GROUP pictures at a time, each for REUSE iterations; all are seen, each once a pass."""
    limits(CACHE_BYTES=0, GROUP=group, REUSE=reuse)
    group = min(group, batch)
    stop = reuse * (2 * -(-length // group) + 1)   # two passes, and the start: the places come in one by one
    stream = make([data.items("images", save_charts(tmp_path, length, 6))], size=4, batch=batch, stop=stop)
    shown, held = zip(*[(numbers(batch_of_k), len(stream.held)) for batch_of_k in stream], strict=True)
    assert set(np.ravel(shown)) == set(range(length)) and len(decoded) <= group * (stop // reuse + 1)
    assert max(held) <= group and np.ptp(np.unique(decoded, return_counts=True)[1]) <= 2
    changes = np.diff(shown, axis=0, prepend=-1) != 0
    for of_place in changes.T:   # a multiple: the next picture may be the same
        assert (np.diff(np.append(np.flatnonzero(of_place), stop))[1:-1] % reuse == 0).all()
    assert changes[1:].sum(axis=1).max() <= -(-batch // group) * -(-group // reuse)   # not all at once


@pytest.mark.parametrize("limit, reads", [(143, 11), (144, 9), (1799, 9), (1800, 6)])
def test_sets_are_kept_or_not_each_by_its_size(limit, reads, decoded, limits, tmp_path):
    """144 bytes of pictures, 1800 of pairs: 3 reads of each where kept, else 6, less one picture that follows
    itself."""
    limits(CACHE_BYTES=limit, REUSE=2)
    save_charts(tmp_path / "clean", 3, 10), save_charts(tmp_path / "noisy", 3, 10)
    sets = [data.items("images", save_charts(tmp_path / "images", 3, 4)), data.items("pairs", tmp_path)]
    assert len(list(make(sets, size=4, batch=2, stop=12))) == 12 and len(decoded) == reads


@pytest.mark.parametrize("workers, cache", [(0, 0), (0, 2 ** 30), (2, 0), (2, 2 ** 30)])
def test_another_picture_takes_the_place_of_one_that_cannot_be_read(workers, cache, limits, tmp_path):
    limits(CACHE_BYTES=cache)
    save_charts(tmp_path, 4, 40)
    (tmp_path / "2.png").write_bytes(b"not a picture")
    batches = list(crops.batches(make([data.items("images", tmp_path)], stop=20), workers))
    assert {n for batch in batches for n in numbers(batch)} == {0, 1, 3}
    left_out = [name for batch in batches for name, why in batch["left_out"] if "cannot read" in why]
    assert set(left_out) == {"2.png"} and len(left_out) <= max(1, workers)
    for path in tmp_path.iterdir():
        path.write_bytes(b"not a picture")
    with pytest.raises(InputError, match="none of 4 pictures can be read; the last one: cannot read"):
        list(crops.batches(make([data.items("images", tmp_path)]), workers))


@pytest.mark.parametrize("seed", range(10))
def test_noise_mix_frequencies(seed):
    gen = np.random.default_rng(seed)
    ranges = ((20.0, 20.0), (35.0, 35.0), (0.0, 10.0), (40.0, 60.0))[:gen.integers(1, 5)]
    camera, clip = gen.choice([0, 0.3, 0.5, 1], 2)
    drawn = [NoiseMix(ranges, camera, clip).draw(gen) for _ in range(4000)]
    assert json.loads(json.dumps(drawn)) == list(map(list, drawn))   # as a label holds them
    of_camera, clipped = np.transpose([(sigma == "camera", clipped is True) for sigma, clipped in drawn])
    assert [of_camera.mean(), clipped.mean()] == pytest.approx([camera, clip], abs=0.035)
    assert (of_camera & clipped).mean() == pytest.approx(camera * clip, abs=0.03)   # independent
    sigmas = np.array([sigma for sigma, _ in drawn if sigma != "camera"])
    for low, high in ranges if len(sigmas) else ():
        inside = sigmas[(low <= sigmas) & (sigmas <= high)]
        assert len(inside) / len(sigmas) == pytest.approx(1 / len(ranges), abs=0.05)
        quarters = [np.quantile(values, [0.25, 0.5, 0.75]) for values in (inside, [low, high])]
        assert quarters[0] == pytest.approx(quarters[1], abs=0.1 * (high - low) + 1e-9)


def test_noise_of_the_stream():
    """Each std asked for is as frequent as the others; of each the asked share is clipped and rounded."""
    grey, mix = [Item("grey", np.full((40, 40, 3), 127, np.uint8))], NoiseMix(((10, 10), (50, 50)), clip=0.4)
    batch = next(iter(make([grey], size=24, batch=400, mix=mix)))
    added, levels = 255 * (batch["noisy"] - batch["clean"]), batch["noisy"].double() * 255
    rounded, std = (levels - levels.round()).abs().amax(dim=(1, 2, 3)) < 1e-4, added.std(dim=(1, 2, 3))
    for sigma in (10, 50):
        of_sigma = (std - sigma).abs() < 0.12 * sigma
        assert of_sigma.double().mean().item() == pytest.approx(0.5, abs=0.1)
        assert rounded[of_sigma].double().mean().item() == pytest.approx(0.4, abs=0.15)
        assert added[of_sigma].mean(dim=(0, 2, 3)).abs().max() < 0.05 * sigma


def stream_of(data_and_more):
    options = "--model m --sigma 0-55 --crop 8 --batch 5 --workers 0 --validation 6 --data " + data_and_more
    return crops.Stream(train_recon.parse(options.split()), DRAW)


@pytest.mark.parametrize("cache", [0, 2 ** 30])
def test_validation_batch(cache, limits, tmp_path, monkeypatch):
    """The same at every call, of pictures held out, one crop of each; the stream shows the others."""
    limits(CACHE_BYTES=cache, REUSE=2)
    monkeypatch.chdir(save_charts(tmp_path, 20, 9))
    stream = stream_of("images --root .")
    validation, batches = stream.validation(), list(stream(0, 40))
    assert validation.keys() >= {"noisy", "clean", "gamma", "eps"} and len(validation["clean"]) == 6
    held_out, shown = set(numbers(validation)), {n for batch in batches for n in numbers(batch)}
    assert len(held_out) == 6 and len(shown) == 14 and not held_out & shown
    for options in ("", "--batch 3", "--workers 2"):
        assert same(stream_of("images --root . " + options).validation(), validation)
    assert not same(stream_of("images --root . --seed 1").validation(), validation)
    assert same([*stream(0, 7), *stream_of("images --root .")(7, 40)], batches)


@pytest.mark.parametrize("options", ["--weight 9 1 --batch 4", "--weight 1 30 --batch 8", "sample --batch 2"])
def test_a_batch_without_a_place_for_a_set_is_refused(options):
    with pytest.raises(InputError, match="no place for one of the data sets"):
        stream_of("sample sample " + options)
    assert len(stream_of(f"sample sample {options}0").sets) >= 2


@pytest.mark.parametrize("sigma", [None, 0.0, 31.4159265358979, 50.0, "camera", *noise.KINDS])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("size", [16, 30])
def test_labelled_patch_is_made_again(sigma, clip, size):
    """sigma None: of a real pair; a kind's name: of the wide mix."""
    gen, kind = np.random.default_rng(0), None
    clean = gen.integers(0, 200, (24, 40, 3), dtype=np.uint8)
    of_pair = clean + np.uint8(40) if sigma is None else None
    place = *crops.random_place(clean, size, gen), size
    if sigma in noise.KINDS and sigma != "camera":
        sigma, kind = "wide", sigma
    label = search.Label(0, 0, "a.png", *place, sigma, clip, kind, 2 ** 32 - 1, "", None, "", [])
    noisy, y = search.labelled_patch(clean, of_pair, search.Label(**json.loads(json.dumps(label._asdict()))))
    assert same(search.labelled_patch(clean, of_pair, label), (noisy, y))
    assert noisy.shape == y.shape == (3, size, size) and noisy.dtype == y.dtype == torch.float32
    expected, generator = crops.cut(clean, *place), np.random.default_rng(label.seed)
    if kind:
        expected, of_kind = noise.wide_mix(expected, generator, kind)
    np.testing.assert_allclose(y.permute(1, 2, 0), expected, atol=1e-6)
    expected = (of_kind if kind else expected + 40 / 255 if sigma is None else
                noise.camera_noise(expected, generator) if sigma == "camera" else
                noise.gaussian_noise(expected, sigma / 255, generator))
    expected = (expected.clip(0, 1) * 255).round() / 255 if clip and not kind else expected
    np.testing.assert_allclose(noisy.permute(1, 2, 0), expected, atol=1e-6)
    other = search.labelled_patch(clean, of_pair, label._replace(seed=label.seed ^ 1))[0]
    assert torch.equal(other, noisy) == (sigma in (None, 0)) or kind == "clean"
