"""Training crops: sample i of iteration k is a function of (seed, k, i) alone, cut from where it should be.

Most pictures here are maps of themselves: the pixel (n, y, x) is row y, column x of picture n, so that a crop
tells where it comes from.
"""

import argparse
import collections
import functools
import json

import numpy as np
import pytest
import torch
from PIL import Image

import train_gen
from rng import ddpm, search
from rng.support import crops, data, noise
from rng.support.crops import Crops, Stream
from rng.support.data import Item
from rng.support.errors import InputError
from rng.support.noise import NoiseMix

NO_NOISE = NoiseMix(((0, 0),))
MIXED = NoiseMix(((0, 55), (25, 25)), camera=0.3, clip=0.5)
SCHEDULE = ddpm.linear_schedule(50, 0.2)
DRAW = functools.partial(train_gen.draw_noise, SCHEDULE)  # gamma and eps of stage 2


def chart(n, height=40, width=50, top=0, left=0):
    """A map of itself, or a part of one: uint8 (height, width, 3)."""
    rows, columns = np.mgrid[top:top + height, left:left + width]
    return np.stack([np.full_like(rows, n), rows, columns], axis=2).astype(np.uint8)


def charts(numbers, **size):
    return [Item(str(n), chart(n, **size)) for n in numbers]


def make(sets, weights=None, size=8, batch=6, mix=NO_NOISE, seed=0, start=0, stop=5, draw=None):
    return Crops(sets, weights or [1] * len(sets), size, batch, mix, seed, start, stop, draw)


def pixels(tensor):
    """(..., 3, H, W) in [0, 1], all of it on multiples of 1/255 -> int (..., H, W, 3)."""
    scaled = tensor.double() * 255
    assert (scaled - scaled.round()).abs().max() < 1e-4
    return scaled.round().int().movedim(-3, -1).numpy()


def numbers(batch):
    """Of which chart each sample of a batch is."""
    return pixels(batch["clean"])[:, 0, 0, 0].tolist()


def place(crop):
    """A crop (H, W, 3) of a chart -> (number, top, left, which of the 8 flips and rotations); fails if it is
    none."""
    number, top, left = crop.min(axis=(0, 1))
    which = [np.array_equal(way, crop) for way in eight_ways(chart(number, *crop.shape[:2], top, left))]
    assert sum(which) == 1
    return number, top, left, which.index(True)


def eight_ways(picture):
    return [np.rot90(way, quarters) for way in (picture, picture[:, ::-1]) for quarters in range(4)]


def same(a, b):
    """Bit for bit, for two batches or two samples."""
    tensors = a.keys() - {"name", "left_out"}
    return a.keys() == b.keys() and a["name"] == b["name"] and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in tensors)


def random_stream(gen):
    """Options of `make` that differ in everything, iterations aside."""
    sets = [charts(range(20 * s, 20 * s + gen.integers(1, 9))) for s in range(gen.integers(1, 4))]
    if gen.random() < 0.5:   # a set of real pairs
        sets[0] = [Item(item.name, item.clean, item.clean // 2) for item in sets[0]]
    return dict(sets=sets, weights=gen.uniform(0.2, 3, len(sets)).tolist(), size=int(gen.integers(5, 16)),
                batch=int(gen.integers(1, 12)), mix=MIXED, seed=int(gen.integers(1000)),
                draw=DRAW if gen.random() < 0.5 else None)


# A function of (seed, k, i) alone


@pytest.mark.parametrize("seed", range(12))
def test_samples_depend_on_seed_iteration_and_place_alone(seed, monkeypatch):
    gen = np.random.default_rng(seed)
    options = random_stream(gen)
    # -1: arrays, which count nothing, do not fit
    monkeypatch.setattr(crops, "CACHE_BYTES", [2 ** 30, -1][seed % 2])
    monkeypatch.setattr(crops, "REUSE", 3)
    first = int(gen.choice([0, 5, 10 ** 6]))
    whole = list(make(**options, start=first, stop=first + 8))
    assert len(whole) == 8 and all(len(batch["clean"]) == options["batch"] for batch in whole)
    assert all(same(*both) for both in zip(whole, make(**options, start=first, stop=first + 8)))
    resumed = int(gen.integers(8))
    rest = list(make(**options, start=first + resumed, stop=first + 8))
    assert len(rest) == 8 - resumed and all(same(*both) for both in zip(whole[resumed:], rest))
    alone = make(**options, start=0, stop=0)
    for k, i in gen.permutation([(k, i) for k in range(8) for i in range(options["batch"])])[:20]:
        sample = {key: value[i] for key, value in whole[k].items() if key != "left_out"}
        assert same(alone.sample(first + int(k), int(i)), sample)


@pytest.mark.parametrize("seed", range(6))
def test_samples_differ(seed):
    """In another iteration, at another place, under another seed."""
    item = charts([1], height=200, width=200)
    options = dict(sets=[item], batch=4, mix=NoiseMix(((25, 25),)), draw=DRAW)
    batches = [batch for s in (seed, seed + 1)
               for batch in make(**options, seed=s, start=seed, stop=seed + 3)]
    for key in ("clean", "noisy", "eps", "gamma"):
        every = torch.cat([batch[key] for batch in batches]).flatten(1 if key != "gamma" else 0)
        assert len(torch.unique(every, dim=0)) == len(every) == 24
    assert len({place(crop)[1:3] for batch in batches for crop in pixels(batch["clean"])}) > 20


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_any_number_of_workers(workers, monkeypatch):
    monkeypatch.setattr(crops, "CACHE_BYTES", -1)
    monkeypatch.setattr(crops, "REUSE", 2)
    options = dict(sets=[charts(range(7)), charts([50, 51, 52])], weights=[2, 1], batch=7, mix=MIXED,
                   draw=DRAW)
    expected = list(make(**options, start=0, stop=6))
    for start in (0, 4):
        got = list(crops.batches(make(**options, start=start, stop=6), workers))
        assert len(got) == 6 - start and all(same(*both) for both in zip(expected[start:], got))


def test_more_workers_than_samples():
    batches = list(crops.batches(make([charts(range(3))], batch=1), 2))
    assert len(batches) == 5 and all(same(*both) for both in zip(batches, make([charts(range(3))], batch=1)))


# What is in a batch


@pytest.mark.parametrize("seed", range(30))
def test_shares_of_a_batch(seed):
    gen = np.random.default_rng(seed)
    count, batch = int(gen.integers(1, 6)), int(gen.integers(1, 40))
    weights = gen.choice([0, 0.5, 1, 2, 7.3], count)
    weights[gen.integers(count)] = 1
    sets = [charts([10 * s, 10 * s + 1]) for s in range(count)]
    stream = make(sets, weights.tolist(), batch=batch, stop=2)
    first, second = (collections.Counter(n // 10 for n in numbers(batch)) for batch in stream)
    assert first == second and sum(first.values()) == batch
    for s in range(count):
        exact = weights[s] / weights.sum() * batch
        assert abs(first[s] - exact) < 1 if weights[s] else first[s] == 0


@pytest.mark.parametrize("draw", [None, DRAW])
@pytest.mark.parametrize("mix", [
    NO_NOISE, NoiseMix(((50, 50),)), NoiseMix(((25, 25),), clip=1), NoiseMix(((0, 0),), camera=1)])
def test_shape_type_and_range(draw, mix):
    gen = np.random.default_rng(0)
    pairs = [Item("a", chart(0), chart(3))]
    pictures = [Item("b", gen.integers(0, 256, (40, 50, 3), dtype=np.uint8))]
    for batch in make([pictures, pairs], size=16, batch=6, mix=mix, draw=draw, stop=3):
        assert batch.keys() == {"name", "left_out", "noisy", "clean"} | ({"gamma", "eps"} if draw else set())
        assert set(batch["name"]) == {"a", "b"}
        for key in batch.keys() - {"name", "left_out", "gamma"}:
            assert batch[key].dtype == torch.float32 and batch[key].shape == (6, 3, 16, 16)
            assert batch[key].is_contiguous() and batch[key].isfinite().all()
        clean, noisy = batch["clean"], batch["noisy"]
        pixels(clean), pixels(noisy[3:])                       # pairs pass as they are
        assert clean.min() >= 0 and clean.max() <= 1 and clean[:3].max() > 0.98
        unclipped = mix.sigma == ((50, 50),)
        assert (noisy.min() < 0 and noisy.max() > 1) if unclipped else (noisy.min() >= 0 and noisy.max() <= 1)


@pytest.mark.parametrize("seed", range(5))
def test_pairs_stay_aligned_in_all_eight_ways(seed):
    """Both crops are the same piece of the two pictures, turned the same way; places and ways are uniform."""
    gen = np.random.default_rng(seed)
    height, width, size = gen.integers(13, 30, 2).tolist() + [10]
    items = [Item(str(n), chart(n, height, width), chart(n, height, width) + np.uint8(100)) for n in range(4)]
    found = []
    for batch in make([items], size=size, batch=40, seed=seed, stop=10):
        assert np.array_equal(pixels(batch["noisy"]), pixels(batch["clean"]) + 100)
        found += [place(crop) for crop in pixels(batch["clean"])]
    _, tops, lefts, ways = (np.bincount(column) for column in np.transpose(found))
    for counts, length in ((tops, height - size + 1), (lefts, width - size + 1), (ways, 8)):
        assert len(counts) == length
        assert np.abs(counts - 400 / length).max() < 5 * np.sqrt(400 / length)


@pytest.mark.parametrize("seed", range(20))
def test_small_pictures_are_extended_by_reflection(seed):
    gen = np.random.default_rng(seed)
    height, width, size = (int(side) for side in gen.integers([1, 1, 2], 20))

    def reflected(length):
        """0, 1, ..., length - 1, length - 2, ..., 1, 0, 1, ...: as often as needed."""
        period = max(1, 2 * (length - 1))
        return np.minimum(np.arange(size) % period, -np.arange(size) % period)

    for crop in pixels(next(iter(make([charts([9], height=height, width=width)], size=size,
                                      batch=20)))["clean"]):
        rows, columns = (np.arange(top, top + size) if length >= size else reflected(length) for top,
                         length in
                         ((crop[..., 1].min(), height), (crop[..., 2].min(), width)))
        assert any(np.array_equal(way, crop) for way in eight_ways(chart(9)[rows][:, columns]))


# Which pictures, and how often they are decoded


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
    start = int(gen.integers(4)) * length   # iterations after which a pass ends
    passes = 3
    stream = make([charts(range(length))], size=4, batch=batch, seed=seed, start=start, stop=start
                  + passes * length)
    seen = np.reshape([n for batch in stream for n in numbers(batch)], (passes * batch, length))
    assert (np.sort(seen, axis=1) == np.arange(length)).all()
    assert length < 6 or len({tuple(order) for order in seen.tolist()}) == passes * batch   # shuffled anew
    assert sorted(decoded) == sorted(map(str, range(length)))                                # once, then kept


@pytest.mark.parametrize("batch, length, group, reuse", [
    (16, 40, 16, 20), (6, 9, 16, 5), (24, 30, 4, 7), (10, 7, 3, 4), (5, 2, 4, 6), (1, 5, 16, 3),
                                                         (7, 11, 3, 1)])
def test_a_set_too_large_to_keep(batch, length, group, reuse, decoded, monkeypatch, tmp_path):
    """GROUP pictures at a time, each for REUSE iterations; the whole set is seen, each picture once a pass.
    """
    monkeypatch.setattr(crops, "CACHE_BYTES", 0)
    monkeypatch.setattr(crops, "GROUP", group)
    monkeypatch.setattr(crops, "REUSE", reuse)
    for n in range(length):
        Image.fromarray(chart(n, 6, 6)).save(tmp_path / f"{n}.png", compress_level=1)
    group = min(group, batch)
    # two passes, and the start, at which the places come in one by one
    stop = reuse * (2 * -(-length // group) + 1)
    stream = make([data.items("images", tmp_path)], size=4, batch=batch, stop=stop)
    shown = []                                     # by iteration: the picture of each sample
    for batch_of_k in stream:
        shown.append(numbers(batch_of_k))
        assert len(stream.held) <= group
    assert set(np.ravel(shown)) == set(range(length))
    assert len(decoded) <= group * (stop // reuse + 1)

    changes = np.diff(shown, axis=0, prepend=-1) != 0
    for i in range(batch):
        starts = np.append(np.flatnonzero(changes[:, i]), stop)
        assert (np.diff(starts)[1:-1] % reuse == 0).all()  # a multiple: the next picture may be the same
    # not all in one iteration
    assert changes[1:].sum(axis=1).max() <= -(-batch // group) * -(-group // reuse)
    counts = np.unique(decoded, return_counts=True)[1]
    assert counts.max() - counts.min() <= 2

    k = stop // 3
    resumed = make([data.items("images", tmp_path)], size=4, batch=batch, start=k, stop=k + 3)
    assert [numbers(again) for again in resumed] == shown[k:k + 3]


def test_sets_are_kept_or_not_each_by_its_size(decoded, monkeypatch, tmp_path):
    for folder, count, side in (("small", 3, 4), ("large", 3, 40)):
        (tmp_path / folder).mkdir()
        for n in range(count):
            Image.fromarray(chart(n, side, side)).save(tmp_path / folder / f"{folder}{n}.png")
    sets = [data.items("images", tmp_path / folder) for folder in ("small", "large")]
    monkeypatch.setattr(crops, "CACHE_BYTES", 3 * 3 * 20 * 20)
    monkeypatch.setattr(crops, "REUSE", 2)
    stream = make(sets, size=4, batch=2, stop=12)
    assert stream.fits == [True, False] and len(list(stream)) == 12
    counts = collections.Counter(name[:5] for name in decoded)
    assert counts == {"small": 3, "large": 6}


def test_both_pictures_of_a_pair_count(monkeypatch, tmp_path):
    for side in ("noisy", "clean"):
        (tmp_path / side).mkdir()
        Image.fromarray(chart(1, 10, 10)).save(tmp_path / side / "a.png")
    for limit, fits in ((599, False), (600, True)):
        monkeypatch.setattr(crops, "CACHE_BYTES", limit)
        assert make([data.items("pairs", tmp_path)]).fits == [fits]


@pytest.mark.parametrize("cache", [0, 2 ** 30])
@pytest.mark.parametrize("workers", [0, 2])
def test_another_picture_takes_the_place_of_one_that_cannot_be_read(workers, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(crops, "CACHE_BYTES", cache)
    for n in range(4):
        Image.fromarray(chart(n)).save(tmp_path / f"{n}.png")
    (tmp_path / "2.png").write_bytes(b"not a picture")
    batches = list(crops.batches(make([data.items("images", tmp_path)], stop=20), workers))
    assert {n for batch in batches for n in numbers(batch)} == {0, 1, 3}
    left_out = [name for batch in batches for name, why in batch["left_out"] if "cannot read" in why]
    assert set(left_out) == {"2.png"} and len(left_out) <= max(1, workers)
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match="none of 4 pictures can be read; the last one: cannot read"):
        list(crops.batches(make([data.items("images", tmp_path)]), workers))


# Noise


@pytest.mark.parametrize("seed", range(10))
def test_noise_mix_frequencies(seed):
    gen = np.random.default_rng(seed)
    ranges = ((20.0, 20.0), (35.0, 35.0), (0.0, 10.0), (40.0, 60.0))[:gen.integers(1, 5)]
    camera, clip = gen.choice([0, 0.3, 0.5, 1], 2)
    drawn = [NoiseMix(ranges, camera, clip).draw(gen) for _ in range(4000)]
    assert {type(clipped) for _, clipped in drawn} == {bool}
    assert np.mean([sigma == "camera" for sigma, _ in drawn]) == pytest.approx(camera, abs=0.035)
    assert np.mean([clipped for _, clipped in drawn]) == pytest.approx(clip, abs=0.035)
    sigmas = np.array([sigma for sigma, _ in drawn if sigma != "camera"])
    for low, high in ranges if len(sigmas) else ():
        inside = sigmas[(low <= sigmas) & (sigmas <= high)]
        assert len(inside) / len(sigmas) == pytest.approx(1 / len(ranges), abs=0.05)
        assert inside.mean() == pytest.approx((low + high) / 2, abs=0.08 * (high - low) + 1e-9)
        assert high == low or np.quantile(inside, [0.25, 0.75]) == pytest.approx(
            [low + (high - low) / 4, high - (high - low) / 4], abs=0.1 * (high - low))
    both = np.mean([sigma == "camera" and clipped for sigma, clipped in drawn])
    assert both == pytest.approx(camera * clip, abs=0.03)                       # independent of each other


def test_add_noise():
    clean = np.random.default_rng(0).random((64, 64, 3), np.float32)
    noisy = noise.add_noise(clean, 25, False, np.random.default_rng(1))
    assert (noisy - clean).std() == pytest.approx(25 / 255, rel=0.02)
    assert np.array_equal(noisy, noise.gaussian_noise(clean, 25 / 255, np.random.default_rng(1)))
    assert np.array_equal(noise.add_noise(clean, "camera", False, np.random.default_rng(1)),
                          noise.camera_noise(clean, np.random.default_rng(1)))
    for sigma in (50, "camera"):
        clipped = noise.add_noise(clean, sigma, True, np.random.default_rng(1))
        raw = noise.add_noise(clean, sigma, False, np.random.default_rng(1))
        assert np.array_equal((clipped * 255).round(), (raw.clip(0, 1) * 255).round())
        assert np.abs(clipped * 255 - (clipped * 255).round()).max() < 1e-4
        assert 0 <= clipped.min() < clipped.max() <= 1


@pytest.mark.parametrize("sigma", [0, 10, 50])
@pytest.mark.parametrize("clip", [0.0, 0.4, 1.0])
def test_noise_of_the_stream(sigma, clip):
    """White, of the std asked for, independent between the samples; the asked share is clipped and rounded.
    """
    grey = [Item("grey", np.full((40, 40, 3), 127, np.uint8))]
    batch = next(iter(make([grey], size=24, batch=60, mix=NoiseMix(((sigma, sigma),), clip=clip))))
    added, levels = batch["noisy"] - batch["clean"], batch["noisy"].double() * 255
    rounded = (levels - levels.round()).abs().amax(dim=(1, 2, 3)) < 1e-4
    if sigma == 0:
        assert added.abs().max() < 1e-6
        return
    assert rounded.double().mean().item() == pytest.approx(clip, abs=0.2 * (0 < clip < 1))
    assert added.std(dim=(1, 2, 3)) * 255 == pytest.approx(sigma, rel=0.12)
    assert added.mean(dim=(0, 2, 3)).abs().max() * 255 < 0.05 * sigma
    correlation = torch.corrcoef(added.flatten(1)) - torch.eye(60)
    assert correlation.abs().max() < 0.15
    assert (added[..., 1:] * added[..., :-1]).mean().abs() < 0.02 * (sigma / 255) ** 2


def test_gamma_and_eps():
    """gamma: float64, in [gamma_T, 1], spread as ddpm.draw_gamma does; eps: standard normal, not the noise
    again."""
    gen = np.random.default_rng(0)
    stream = make([charts([1])], size=16, batch=200, mix=NoiseMix(((25, 25),)), stop=3, draw=DRAW)
    batches = list(stream)
    gamma, eps = (torch.cat([batch[key] for batch in batches]) for key in ("gamma", "eps"))
    assert gamma.dtype == torch.float64 and gamma.shape == (600,)
    assert SCHEDULE.gamma[-1] <= gamma.min() and gamma.max() <= 1
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        expected = np.quantile([ddpm.draw_gamma(SCHEDULE, gen) for _ in range(2000)], share)
        assert (gamma.numpy() <= expected).mean() == pytest.approx(share, abs=0.09)
    assert eps.mean().item() == pytest.approx(0, abs=0.01) and eps.std().item() == pytest.approx(1, abs=0.01)
    assert (eps ** 4).mean().item() == pytest.approx(3, abs=0.1)
    assert (torch.corrcoef(eps.flatten(1)) - torch.eye(600)).abs().max() < 0.25
    added = torch.cat([batch["noisy"] - batch["clean"] for batch in batches])
    per_sample = (added * eps).mean(dim=(1, 2, 3)) / (25 / 255)
    assert per_sample.abs().max() < 0.2
    without = make([charts([1])], size=16, batch=200, mix=NoiseMix(((25, 25),)), stop=3)
    for a, b in zip(without, batches, strict=True):  # stage 1 sees the same
        assert torch.equal(a["noisy"], b["noisy"]) and torch.equal(a["clean"], b["clean"])


# Both training scripts


def options(folder, **changes):
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    args = parser.parse_args(["--data", "images", "--root", str(folder), "--sigma", "0-55"])
    others = dict(crop=4, batch=5, seed=0, workers=0, validation=6, noise="gaussian")
    return argparse.Namespace(**vars(args) | others | changes)


@pytest.mark.parametrize("cache", [0, 2 ** 30])
def test_validation_batch(cache, monkeypatch, tmp_path):
    """The same at every call, of pictures held out, one crop of each; the stream shows the others."""
    monkeypatch.setattr(crops, "CACHE_BYTES", cache)
    monkeypatch.setattr(crops, "REUSE", 2)
    for n in range(20):
        Image.fromarray(chart(n, 9, 9)).save(tmp_path / f"{n:02d}.png")
    stream = Stream(options(tmp_path), DRAW)
    validation = stream.validation()
    assert validation.keys() >= {"noisy", "clean", "gamma", "eps"} and len(validation["clean"]) == 6
    held_out = set(numbers(validation))
    shown = {n for batch in stream(0, 40) for n in numbers(batch)}
    assert len(held_out) == 6 and len(shown) == 14 and not held_out & shown
    for changes in ({}, {"batch": 3}, {"workers": 2}):
        assert same(Stream(options(tmp_path, **changes), DRAW).validation(), validation)
    assert not same(Stream(options(tmp_path, seed=1), DRAW).validation(), validation)


@pytest.mark.parametrize("seed", range(3))
def test_stream_goes_on_where_it_stopped(seed, tmp_path):
    for n in range(8):
        Image.fromarray(chart(n, 9, 9)).save(tmp_path / f"{n}.png")
    args = options(tmp_path, seed=seed, validation=2)
    whole = list(Stream(args)(0, 6))
    parts = [*Stream(args)(0, 2), *Stream(args)(2, 6)]
    assert len(whole) == len(parts) == 6 and all(same(*both) for both in zip(whole, parts))


# Labels


def made(top, left, size, sigma, clip, seed):
    return search.Label(0, 0, "a.png", top, left, size, sigma, clip, seed, "", None, "", [])


@pytest.mark.parametrize("sigma", [0.0, 31.4159265358979, 50.0, "camera"])
@pytest.mark.parametrize("clip", [False, True])
def test_labelled_patch_is_made_again(sigma, clip):
    gen = np.random.default_rng(0)
    for size in (16, 30):
        clean = gen.integers(0, 256, (24, 40, 3), dtype=np.uint8)
        top, left = crops.random_place(clean, size, gen)
        label = made(top, left, size, sigma, clip, 2 ** 32 - 1)
        noisy, y = search.labelled_patch(clean, None, label)
        again = search.labelled_patch(clean, None, search.Label(**json.loads(json.dumps(label._asdict()))))
        assert torch.equal(noisy, again[0]) and torch.equal(y, again[1])
        assert noisy.shape == y.shape == (3, size, size) and noisy.dtype == y.dtype == torch.float32
        rows = min(size, 24)
        assert np.array_equal(pixels(y)[:rows], clean[top:top + rows, left:left + size])
        expected = noise.add_noise(y.permute(1, 2, 0).numpy(), sigma, clip, np.random.default_rng(label.seed))
        assert torch.equal(noisy, torch.from_numpy(expected).permute(2, 0, 1))
        other = search.labelled_patch(clean, None, label._replace(seed=label.seed ^ 1))[0]
        assert torch.equal(other, noisy) == (sigma == 0)


def test_labelled_patch_of_a_real_pair():
    clean = np.random.default_rng(0).integers(0, 200, (24, 40, 3), dtype=np.uint8)
    label = made(5, 11, 16, None, False, 3)
    x, y = (pixels(patch) for patch in search.labelled_patch(clean, clean + np.uint8(40), label))
    assert np.array_equal(y, clean[5:21, 11:27]) and np.array_equal(x, y + 40)


def test_label_of_a_drawn_mix_is_plain_json():
    gen = np.random.default_rng(0)
    for _ in range(50):
        sigma, clip = MIXED.draw(gen)
        assert json.loads(json.dumps([sigma, clip])) == [sigma, clip]


@pytest.mark.parametrize("weights, batch", [((9, 1), 4), ((1, 30), 8), ((1, 1, 1), 2)])
def test_a_batch_without_a_place_for_a_set_is_refused(weights, batch):
    several = dict(data=["sample"] * len(weights), root=None, weight=weights)
    with pytest.raises(InputError, match="no place for one of the data sets"):
        Stream(options(None, batch=batch, **several))
    Stream(options(None, batch=40, **several))
