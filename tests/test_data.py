"""rng/support/data.py on small folders in the published layouts, held-out pictures, noise of the tests."""

import argparse
import itertools
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from rng.support import data
from rng.support.errors import InputError, Parser
from rng.support.noise import noisy_version

MEDIUM, SCENE = "SIDD_Medium_Srgb/Data", "0001_001_S6_00100_00060_3200_L"
BLOCKS = ("ValidationGtBlocksSrgb", "ValidationNoisyBlocksSrgb")


def picture(seed, height=8, width=9):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def touch(root, *names):
    """Names alone: no picture is opened to list or split a data set."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return str(root)


def save_blocks(root, compress=False):
    """The two validation files of SIDD -> (clean, noisy), uint8 (scenes, blocks, size, size, 3)."""
    clean, noisy = np.random.default_rng(0).integers(0, 256, (2, 2, 3, 16, 16, 3), dtype=np.uint8)
    for name, blocks in zip(BLOCKS, (clean, noisy)):
        scipy.io.savemat(root / f"{name}.mat", {name: blocks}, do_compression=compress)
    return clean, noisy


def refusal(function, *args):
    """The message of the InputError that the call must raise: one line."""
    with pytest.raises(InputError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# SIDD


@pytest.mark.parametrize("prefix", ["0001_", ""])
@pytest.mark.parametrize("extension", ["PNG", "png"])
def test_sidd_training_pairs(tmp_path, prefix, extension):
    items = []
    for scene, number in itertools.product((SCENE, "0002_001_S6_00100_00020_3200_N"), ("010", "011")):
        clean, noisy = (tmp_path / MEDIUM / scene / f"{prefix}{kind}_SRGB_{number}.{extension}"
                        for kind in ("GT", "NOISY"))
        touch(clean.parent, clean, noisy, "../readme.txt", f"._{noisy.name}", f"._{prefix}GT_SRGB_012.PNG")
        items.append(data.Item(f"{scene}_{noisy.stem}", clean, noisy))
    assert data.items("sidd", tmp_path, "train") == items


PAIR = tuple(f"{MEDIUM}/{SCENE}/0001_{kind}_SRGB_010.PNG" for kind in ("NOISY", "GT"))


@pytest.mark.parametrize("files, root, says", [
    ([], "", "{root} holds nothing"),
    (PAIR[:1], "", "0001_GT_SRGB_010.PNG is missing beside 0001_NOISY_SRGB_010.PNG"),
    (PAIR[1:], "", "0001_NOISY_SRGB_010.PNG is missing beside 0001_GT_SRGB_010.PNG"),
    ([f"{MEDIUM}/{SCENE}/notes.txt"], "", f"Data holds {SCENE};"),
    ([f"SIDD_Small_sRGB_Only/Data/{SCENE}/NOISY_SRGB_010.PNG"], "", "{root} holds SIDD_Small_sRGB_Only;"),
    ([f"deep/{name}" for name in PAIR], "", "give --root {root}/deep$"),
    ([f"SIDD_Medium_Srgb/{name}" for name in PAIR], "", "give --root {root}/SIDD_Medium_Srgb$"),
    *((PAIR, root, "give --root {root}$") for root in ("SIDD_Medium_Srgb", MEDIUM))])
def test_sidd_in_another_layout(tmp_path, files, root, says):
    touch(tmp_path, *files)
    message = refusal(data.items, "sidd", tmp_path / root, "train")
    assert f"expected {MEDIUM}/SCENE/*NOISY_SRGB_*.PNG" in message
    assert says.format(root=tmp_path) in f"{message}$"


@pytest.mark.parametrize("compress", [False, True])
def test_sidd_validation_blocks(tmp_path, compress):
    clean, noisy = save_blocks(tmp_path, compress)
    for item, place in zip(data.items("sidd", tmp_path), np.ndindex(2, 3), strict=True):
        assert item.name == "%02d_%02d" % place and item.clean.dtype == item.noisy.dtype == np.uint8
        assert np.array_equal(item.clean, clean[place]) and np.array_equal(item.noisy, noisy[place])


@pytest.mark.parametrize("compress", [False, True])
def test_sidd_damaged_blocks(tmp_path, compress):
    save_blocks(tmp_path, compress)
    path = tmp_path / f"{BLOCKS[1]}.mat"
    whole, half = path.read_bytes(), path.stat().st_size // 2
    flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1:]  # where not compressed, of a pixel
    cut = [whole[:end] for end in (0, 4, 100, 128, half, -5)]             # the header has 128 bytes
    for damaged in (*cut, bytes(200), b"junk" * 100, *[flipped] * compress):
        path.write_bytes(damaged)
        assert f"{path} is damaged" in refusal(data.items, "sidd", tmp_path)


@pytest.mark.parametrize("name, blocks, says", [("blocks", picture(0), "has no variable"), *(
    (BLOCKS[1], blocks, "uint8") for blocks in (
        3.0, picture(0), np.zeros((1, 3, 16, 16, 3), np.uint8), np.zeros((2, 3, 16, 16, 3))))])
def test_sidd_blocks_of_another_kind(tmp_path, name, blocks, says):
    save_blocks(tmp_path)
    scipy.io.savemat(tmp_path / f"{BLOCKS[1]}.mat", {name: blocks})
    message = refusal(data.items, "sidd", tmp_path)
    assert BLOCKS[1] in message and says in message


# DIV2K and Flickr2K, pairs, images, sample


def test_div2k_and_flickr2k(tmp_path, capsys):
    div2k, flickr2k, test = ([data.Item(f"{name}.png", tmp_path / folder / f"{name}.png") for name in names]
                             for folder, *names in (("DIV2K_train_HR", "0001", "0800"),
                                                    ("Flickr2K_HR", "000001", "002650"),
                                                    ("DIV2K_valid_HR", "0801", "0900")))
    for item in div2k + flickr2k + test:
        touch(item.clean.parent, item.clean, f"._{item.clean.name}")
    assert data.items("div2k", tmp_path, "train") == div2k + flickr2k
    assert data.items("div2k", tmp_path, "test") == test and capsys.readouterr().err == ""


def test_div2k_goes_without_flickr2k_but_not_the_other_way(tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    touch(a, "DIV2K_train_HR/0001.png")
    assert [item.name for item in data.items("div2k", a, "train")] == ["0001.png"]
    assert capsys.readouterr().err.startswith(f"note: {a / 'Flickr2K_HR'} is missing")
    touch(b, "Flickr2K_HR/1.png", "DIV2K/DIV2K_train_HR/1.png")
    message = refusal(data.items, "div2k", b, "train")
    assert str(b / "DIV2K_train_HR") in message and f"--root {b / 'DIV2K'}" in message


def test_pairs_match_by_name(tmp_path):
    names = ["b.png", "a.tif", "c.PNG", "a.png"]
    touch(tmp_path / "clean", *names)
    touch(tmp_path / "noisy", *names[::-1], "Thumbs.db", "._b.png")
    assert data.items("pairs", tmp_path) == [
        data.Item(name, tmp_path / "clean" / name, tmp_path / "noisy" / name) for name in sorted(names)]


@pytest.mark.parametrize("side, other", [("noisy", "clean"), ("clean", "noisy")])
def test_pairs_name_the_odd_file(tmp_path, side, other):
    touch(tmp_path, "noisy/a.png", "noisy/c.png", "clean/a.png", "clean/c.png", f"{side}/b.png")
    assert "b.png" in refusal(data.items, "pairs", tmp_path)
    touch(tmp_path, f"{other}/d.png")   # as many, but not the same
    assert "b.png" in refusal(data.items, "pairs", tmp_path)


def test_images_takes_pictures_only_and_in_order(tmp_path):
    names = ["d.webp", "b.PNG", "a.jpg", "c.tiff", "e.jpeg", "a.png"]
    touch(tmp_path, *names, "notes.txt", "._a.png", "folder.png/f.png")
    assert data.items("images", tmp_path) == [data.Item(name, tmp_path / name) for name in sorted(names)]


def test_sample_is_there():
    items = data.items("sample")
    assert len(items) == len(data.SAMPLE) > 4
    for item in items:
        clean, noisy = item.read()
        assert clean.dtype == np.uint8 and clean.shape[2:] == (3,) and min(clean.shape[:2]) >= 256
        assert noisy is None and (clean[..., 0] != clean[..., 2]).any()   # in colour


YORK, ETH = "www.eecs.yorku.ca/~kamel/sidd", "data.vision.ee.ethz.ch/cvl/DIV2K"


@pytest.mark.parametrize("name, split, folder, layout, source", [
    ("sidd", "train", MEDIUM, "NOISY_SRGB", YORK), ("sidd", "test", f"{BLOCKS[0]}.mat", BLOCKS[1], YORK),
    ("div2k", "train", "DIV2K_train_HR", "Flickr2K_HR", ETH), ("div2k", "test", "DIV2K_valid_HR", "HR", ETH),
    ("pairs", "train", "noisy", "clean/", "own"), ("images", "test", "", "PNG", "own")])
@pytest.mark.parametrize("state", ["absent", "empty", "a file"])
def test_missing_folder_in_one_sentence(tmp_path, monkeypatch, name, split, folder, layout, source, state):
    monkeypatch.chdir(tmp_path)
    root = Path("datasets", name)
    if state == "empty":
        (root / folder.removesuffix(f"{BLOCKS[0]}.mat")).mkdir(parents=True)
    elif state == "a file":
        touch(tmp_path, root)
    message = refusal(data.items, name, None if state == "absent" else root, split)
    assert all(part in message for part in (str(root / folder), layout, source, "--root"))


def test_item_reads_every_kind_as_rgb(tmp_path):
    grey, alpha = tmp_path / "grey.png", tmp_path / "alpha.png"
    Image.fromarray(picture(0)[..., 0]).save(grey)
    Image.fromarray(np.dstack([picture(0), picture(1)[..., :1]])).save(alpha)
    clean, noisy = data.Item("x", grey, alpha).read()
    assert np.array_equal(clean, picture(0)[..., :1].repeat(3, 2)) and np.array_equal(noisy, picture(0))
    assert data.Item("x", picture(2)).read()[1] is None
    assert "wall" in refusal(data.Item("wall", grey, picture(1, height=9, width=8)).read)


# Training and validation


@pytest.mark.parametrize("seed", range(20))
def test_held_out_pictures(tmp_path, seed):
    gen = np.random.default_rng(seed)
    total, wanted = int(gen.integers(2, 40)), int(gen.integers(1, 20))
    call = ["images"], [touch(tmp_path, *(f"{n:03d}.png" for n in range(total)))], wanted
    (train,), (held_out,) = data.training_sets(*call)
    places = [int(item.clean.stem) for item in held_out]
    assert len(places) == (wanted if wanted <= total // 2 else max(1, total // 4))
    assert sorted(places + [int(item.clean.stem) for item in train]) == list(range(total))  # none lost
    gaps = np.diff([*places, places[0] + total])
    assert gaps.max() - gaps.min() <= 1                                                      # evenly spread
    assert data.training_sets(*call) == ([train], [held_out])                                # fixed
    (all_of_it,), held_out = data.training_sets(*call[:2])                                   # for labels
    assert len(all_of_it) == total and held_out == [[]]


@pytest.mark.parametrize("wanted, scenes", [(1, 1), (4, 1), (7, 2), (64, 2)])
def test_sidd_without_blocks_holds_whole_scenes_out(tmp_path, wanted, scenes, capsys):
    for n in range(30):
        touch(tmp_path / MEDIUM / f"{n:04d}_{n % 10 + 1:03d}_S6_00100_00060_3200_L", *(
            f"{n:04d}_{kind}_SRGB_{shot}.PNG" for kind in ("NOISY", "GT") for shot in ("010", "011")))
    (train,), (held_out,) = data.training_sets(["sidd"], [str(tmp_path)], wanted)
    sides = [{item.name.split("_")[1] for item in items} for items in (train, held_out)]
    assert not sides[0] & sides[1] and len(sides[0]) == 10 - scenes and len(train) == 60 - 6 * scenes
    told = capsys.readouterr().err
    assert len(held_out) == min(wanted, 6 * scenes) and "whole scenes" in told
    assert told.startswith(f"note: {tmp_path}: 10 scenes, 60 pairs\n")


def test_validation_is_shared_among_sets(tmp_path):
    roots = [touch(tmp_path / side, *(f"{n}.png" for n in range(30))) for side in "ab"]
    train, held_out = data.training_sets(["images", "sample", "images"], [roots[0], "unused", roots[1]], 7)
    assert [len(items) for items in held_out] == [3, 1, 3] and [len(items) for items in train] == [27, 4, 27]
    assert train[0][0].clean.parent.name == "a" and train[2][0].clean.parent.name == "b"


def test_validation_of_published_splits(tmp_path):
    touch(tmp_path, *PAIR, *(name.replace("010", "011") for name in PAIR), *(
        f"{folder}/{n}.png" for folder in ("DIV2K_train_HR", "Flickr2K_HR", "DIV2K_valid_HR") for n in "12"))
    save_blocks(tmp_path)
    train, held_out = data.training_sets(["sidd", "div2k"], [str(tmp_path)] * 2, 4)
    assert list(map(len, train)) == [2, 4] and [item.name for item in held_out[0]] == ["00_00", "01_00"]
    assert held_out[1] == data.items("div2k", tmp_path) and not set(held_out[1]) & set(train[1])


# Options and noise


def parsed(line):
    data.add_arguments(parser := Parser("Title.\n\nText"))
    return parser.parse_args(line.split())


def test_options():
    args = parsed("--data div2k pairs --root a b --weight 3 1 --sigma 0-55 25 --camera 0.5")
    assert (args.data, args.root, args.sigma) == (["div2k", "pairs"], ["a", "b"], [(0, 55), (25, 25)])
    assert (args.camera, args.clip_noisy, *data.weights_of(args)) == (0.5, 0, 3, 1)
    assert parsed("").sigma == [(20, 20), (35, 35), (50, 50)] and parsed("").data == ["sidd"]
    assert data.weights_of(parsed("--data sample sample")).tolist() == [1, 1]


@pytest.mark.parametrize("bad", [
    "--data cbsd", "--sigma 300", "--camera 1.5", "--camera -0.1", "--camera nan", "--clip-noisy 2",
    "--clip-noisy 50", "--root a", "--root a b c", "--weight 1", "--weight 0 0", "--weight -1 1",
    "--weight 1 nan", "--weight 1 inf"])
def test_bad_options(bad):
    with pytest.raises(InputError, match=bad.split()[0]):
        args = parsed(f"--data sample sample {bad}")
        data.weights_of(args)
        data.training_sets(args.data, args.root)


@pytest.mark.parametrize("sigma", [0, 15, 25, 50, 7.5])
@pytest.mark.parametrize("size", [(40, 30), (7, 64)])
def test_noise_of_the_tests(sigma, size):
    clean, state = picture(0, *size), np.random.get_state()[1].copy()
    clean[:2] = [[[0] * 3], [[255] * 3]]
    noisy = noisy_version(clean, sigma)
    assert np.array_equal(np.random.get_state()[1], state)  # the global seed is left alone
    expected = clean / 255 + np.random.RandomState(0).normal(0, sigma / 255, clean.shape)
    assert noisy.dtype == np.float32 and np.array_equal(noisy, expected.astype(np.float32))
    assert sigma == 0 or (noisy.min() < 0 and noisy.max() > 1)  # not clipped


@pytest.mark.parametrize("text, low, high", [
    ("25", 25, 25), ("0", 0, 0), ("255", 255, 255), ("0-55", 0, 55), ("12.5", 12.5, 12.5), ("5-5", 5, 5),
    ("0.5-7.25", 0.5, 7.25), ("0-255", 0, 255)])
def test_sigma_range(text, low, high):
    assert data.sigma_range(text) == (low, high)


@pytest.mark.parametrize("text", [
    "", "-", "-5", "5-", "256", "0-256", "55-0", "5-10-15", "x", "5-x", "nan", "0-nan", "inf", "0:55"])
def test_bad_sigma(text):
    with pytest.raises(argparse.ArgumentTypeError, match="0-55"):
        data.sigma_range(text)
