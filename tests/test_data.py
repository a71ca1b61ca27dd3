"""rng/data.py on small folders built in the published layouts, the held-out split, and the noise of the tests."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from rng import data
from rng.errors import InputError

SCENE = "0001_001_S6_00100_00060_3200_L"
BLOCKS = ("ValidationGtBlocksSrgb", "ValidationNoisyBlocksSrgb")


def picture(seed, height=8, width=9):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def save_blocks(root, shape=(2, 3, 256, 256, 3), compress=False):
    """The two validation files of SIDD -> (clean, noisy), uint8 (scenes, blocks, 256, 256, 3)."""
    clean, noisy = (np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8) for seed in (0, 1))
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
    expected = {}
    for s, scene in enumerate((SCENE, "0002_001_S6_00100_00020_3200_N")):
        for n, number in enumerate(("010", "011")):
            folder = tmp_path / "SIDD_Medium_Srgb" / "Data" / scene
            noisy, clean = picture([s, n, 0]), picture([s, n, 1])
            save(folder / f"{prefix}NOISY_SRGB_{number}.{extension}", noisy)
            save(folder / f"{prefix}GT_SRGB_{number}.{extension}", clean)
            expected[f"{scene}_{prefix}NOISY_SRGB_{number}"] = clean, noisy
    (tmp_path / "SIDD_Medium_Srgb" / "Data" / "readme.txt").write_text("not a scene")
    items = data.items("sidd", tmp_path, "train")
    assert sorted(item.name for item in items) == sorted(expected)
    for item in items:
        assert all(np.array_equal(*both) for both in zip(item.read(), expected[item.name]))


def test_sidd_names_the_missing_ground_truth(tmp_path):
    folder = tmp_path / "SIDD_Medium_Srgb" / "Data" / SCENE
    save(folder / "0001_NOISY_SRGB_010.PNG", picture(0))
    save(folder / "0001_GT_SRGB_011.PNG", picture(1))
    assert "0001_GT_SRGB_010.PNG" in refusal(data.items, "sidd", tmp_path, "train")


@pytest.mark.parametrize("compress", [False, True])
def test_sidd_validation_blocks(tmp_path, compress):
    clean, noisy = save_blocks(tmp_path, compress=compress)
    items = data.items("sidd", tmp_path)
    assert len(items) == len({item.name for item in items}) == 6
    for n, item in enumerate(items):
        gt, x = item.read()
        assert gt.dtype == x.dtype == np.uint8
        assert np.array_equal(gt, clean[n // 3, n % 3]) and np.array_equal(x, noisy[n // 3, n % 3])


DAMAGES = {
    "empty": lambda content: b"",
    "4 bytes": lambda content: content[:4],
    "half a header": lambda content: content[:100],
    "header alone": lambda content: content[:128],
    "half": lambda content: content[:len(content) // 2],
    "end missing": lambda content: content[:-5],
    "zeros": lambda content: bytes(200),
    "another format": lambda content: b"junk" * 100,
}


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_sidd_damaged_blocks(tmp_path, damage, compress):
    save_blocks(tmp_path, (2, 3, 16, 16, 3), compress)
    path = tmp_path / f"{BLOCKS[1]}.mat"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert f"{path} is damaged" in refusal(data.items, "sidd", tmp_path)


def test_sidd_blocks_with_a_flipped_bit(tmp_path):
    save_blocks(tmp_path, (2, 3, 16, 16, 3), compress=True)
    path = tmp_path / f"{BLOCKS[0]}.mat"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert f"{path} is damaged" in refusal(data.items, "sidd", tmp_path)


def test_sidd_blocks_under_another_name(tmp_path):
    save_blocks(tmp_path, (2, 3, 16, 16, 3))
    scipy.io.savemat(tmp_path / f"{BLOCKS[0]}.mat", {"blocks": picture(0)})
    assert f"has no variable {BLOCKS[0]}" in refusal(data.items, "sidd", tmp_path)


@pytest.mark.parametrize("blocks", [
    3.0, picture(0), np.zeros((1, 3, 16, 16, 3), np.uint8), np.zeros((2, 3, 16, 16, 3))],
    ids=["a number", "one picture", "fewer scenes", "floats"])
def test_sidd_blocks_of_another_shape_or_type(tmp_path, blocks):
    save_blocks(tmp_path, (2, 3, 16, 16, 3))
    scipy.io.savemat(tmp_path / f"{BLOCKS[1]}.mat", {BLOCKS[1]: blocks})
    assert BLOCKS[1] in refusal(data.items, "sidd", tmp_path)


# DIV2K and Flickr2K, pairs, images, sample


def test_div2k_and_flickr2k(tmp_path):
    for folder, names in {"DIV2K_train_HR": ("0001", "0800"), "DIV2K_valid_HR": ("0801", "0900"),
                          "Flickr2K_HR": ("000001", "002650")}.items():
        for name in names:
            save(tmp_path / folder / f"{name}.png", picture(int(name)))
    train, test = data.items("div2k", tmp_path, "train"), data.items("div2k", tmp_path, "test")
    assert [item.name for item in train] == ["0001", "0800", "000001", "002650"]
    assert [item.name for item in test] == ["0801", "0900"]
    for item in train + test:
        clean, noisy = item.read()
        assert np.array_equal(clean, picture(int(item.name))) and noisy is None


@pytest.mark.parametrize("missing", ["DIV2K_train_HR", "Flickr2K_HR"])
def test_div2k_names_the_missing_folder(tmp_path, missing):
    for folder in {"DIV2K_train_HR", "Flickr2K_HR"} - {missing}:
        save(tmp_path / folder / "0001.png", picture(0))
    assert str(tmp_path / missing) in refusal(data.items, "div2k", tmp_path, "train")


def test_pairs_match_by_name(tmp_path):
    for n, name in enumerate(("b.png", "a.tif", "c.PNG")):
        save(tmp_path / "noisy" / name, picture([n, 0]))
        save(tmp_path / "clean" / name, picture([n, 1]))
    (tmp_path / "noisy" / "Thumbs.db").write_bytes(b"not a picture")
    pairs = {item.clean.stem: item.read() for item in data.items("pairs", tmp_path)}
    assert sorted(pairs) == ["a", "b", "c"]
    for n, name in enumerate("bac"):
        clean, noisy = pairs[name]
        assert np.array_equal(noisy, picture([n, 0])) and np.array_equal(clean, picture([n, 1]))


@pytest.mark.parametrize("side", ["noisy", "clean"])
def test_pairs_name_the_odd_file(tmp_path, side):
    for name in ("a.png", "c.png"):
        save(tmp_path / "noisy" / name, picture(0))
        save(tmp_path / "clean" / name, picture(1))
    save(tmp_path / side / "b.png", picture(2))
    assert "b.png" in refusal(data.items, "pairs", tmp_path)
    save(tmp_path / ({"noisy", "clean"} - {side}).pop() / "d.png", picture(2))   # as many, but not the same
    assert "b.png" in refusal(data.items, "pairs", tmp_path)


def test_images_takes_pictures_only_and_in_order(tmp_path):
    names = ["d.webp", "b.PNG", "a.jpg", "c.tiff", "e.jpeg"]
    for n, name in enumerate(names):
        save(tmp_path / name, picture(n))
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "folder").mkdir()
    items = data.items("images", tmp_path)
    assert [item.clean.name for item in items] == sorted(names) and all(item.noisy is None for item in items)


@pytest.mark.parametrize("name", ["images", "pairs"])
def test_names_tell_pictures_apart(tmp_path, name):
    """Step labels find their picture by its name."""
    for folder in ("", "noisy", "clean"):
        for file in ("1.png", "1.tif"):
            save(tmp_path / folder / file, picture(0))
    items = data.items(name, tmp_path)
    assert len({item.name for item in items}) == len(items)


def test_sample_is_there():
    items = data.items("sample")
    assert len(items) == len(data.SAMPLE) > 4
    for item in items:
        clean, noisy = item.read()
        assert clean.dtype == np.uint8 and clean.ndim == 3 and clean.shape[2] == 3 and min(clean.shape[:2]) >= 256
        assert noisy is None and (clean[..., 0] != clean[..., 2]).any()   # in colour


@pytest.mark.parametrize("name, split, folder, layout, source", [
    ("sidd", "train", "SIDD_Medium_Srgb/Data", "NOISY_SRGB", "www.eecs.yorku.ca/~kamel/sidd"),
    ("sidd", "test", "ValidationGtBlocksSrgb.mat", "ValidationNoisyBlocksSrgb.mat", "www.eecs.yorku.ca/~kamel/sidd"),
    ("div2k", "train", "DIV2K_train_HR", "Flickr2K_HR", "data.vision.ee.ethz.ch/cvl/DIV2K"),
    ("div2k", "test", "DIV2K_valid_HR", "DIV2K_valid_HR", "data.vision.ee.ethz.ch/cvl/DIV2K"),
    ("pairs", "train", "noisy", "clean/", "own"),
    ("images", "test", "", "PNG", "own"),
])
@pytest.mark.parametrize("state", ["absent", "empty", "a file"])
def test_missing_folder_in_one_sentence(tmp_path, name, split, folder, layout, source, state):
    root = tmp_path / "nowhere"
    if state == "empty":
        (root / folder if not folder.endswith(".mat") else root).mkdir(parents=True)
    elif state == "a file":
        root.write_text("")
    message = refusal(data.items, name, root, split)
    assert str(root / folder) in message and layout in message and source in message and "--root" in message


def test_default_root_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sidd", "div2k", "pairs", "images"):
        assert str(Path("datasets") / name) in refusal(data.items, name)


def test_item_reads_every_kind_as_rgb(tmp_path):
    save(tmp_path / "grey.png", picture(0)[..., 0])
    save(tmp_path / "alpha.png", np.dstack([picture(0), picture(1)[..., :1]]))
    clean, noisy = data.Item("x", tmp_path / "grey.png", tmp_path / "alpha.png").read()
    assert np.array_equal(clean, picture(0)[..., :1].repeat(3, 2)) and np.array_equal(noisy, picture(0))
    assert data.Item("x", picture(2)).read()[1] is None


def test_item_refuses_pairs_of_two_sizes(tmp_path):
    save(tmp_path / "clean.png", picture(0, 8, 9))
    save(tmp_path / "noisy.png", picture(1, 9, 8))
    assert "wall" in refusal(data.Item("wall", tmp_path / "clean.png", tmp_path / "noisy.png").read)
    assert "wall" in refusal(data.Item("wall", picture(0, 8, 9), picture(1, 8, 8)).read)


# Training and validation


def arguments(**options):
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    return argparse.Namespace(**vars(parser.parse_args([])) | options)


def image_folder(root, count):
    """Names alone: the split opens no picture."""
    root.mkdir(exist_ok=True)
    for n in range(count):
        (root / f"{n:03d}.png").touch()
    return str(root)


@pytest.mark.parametrize("seed", range(20))
def test_held_out_pictures(tmp_path, seed):
    gen = np.random.default_rng(seed)
    total, wanted = int(gen.integers(2, 40)), int(gen.integers(1, 20))
    args = arguments(data=["images"], root=[image_folder(tmp_path, total)])
    (train,), (held_out,) = data.training_items(args, wanted)
    places = [int(item.clean.stem) for item in held_out]
    assert len(places) == (wanted if wanted <= total // 2 else max(1, total // 4))
    assert sorted(places + [int(item.clean.stem) for item in train]) == list(range(total))   # disjoint, none lost
    gaps = np.diff([*places, places[0] + total])
    assert gaps.max() - gaps.min() <= 1                                                      # evenly spread
    assert data.training_items(args, wanted) == ([train], [held_out])                        # fixed


def test_nothing_is_held_out_for_labels(tmp_path):
    train, held_out = data.training_items(arguments(data=["images"], root=[image_folder(tmp_path, 5)]), 0)
    assert len(train[0]) == 5 and held_out == [[]]


def test_validation_is_shared_among_sets(tmp_path):
    args = arguments(data=["images", "sample", "images"], root=[image_folder(tmp_path / "a", 30), "unused",
                                                                image_folder(tmp_path / "b", 30)])
    train, held_out = data.training_items(args, 7)
    assert [len(items) for items in held_out] == [3, 1, 3] and [len(items) for items in train] == [27, 4, 27]
    assert train[0][0].clean.parent.name == "a" and train[2][0].clean.parent.name == "b"


def test_validation_of_published_splits(tmp_path):
    folder = tmp_path / "SIDD_Medium_Srgb" / "Data" / SCENE
    for number in ("010", "011"):
        save(folder / f"0001_NOISY_SRGB_{number}.PNG", picture(0))
        save(folder / f"0001_GT_SRGB_{number}.PNG", picture(1))
    save_blocks(tmp_path, (2, 3, 16, 16, 3))
    for folder in ("DIV2K_train_HR", "Flickr2K_HR", "DIV2K_valid_HR"):
        for name in ("1", "2"):
            save(tmp_path / folder / f"{folder}{name}.png", picture(0))
    args = arguments(data=["sidd", "div2k"], root=[str(tmp_path)] * 2)
    train, held_out = data.training_items(args, 4)
    assert [len(items) for items in train] == [2, 4] and [len(items) for items in held_out] == [2, 2]
    blocks = data.items("sidd", tmp_path, "test")
    assert [item.name for item in held_out[0]] == [blocks[0].name, blocks[3].name]
    assert all(item.clean.parent.name == "DIV2K_valid_HR" for item in held_out[1])
    assert all(item.clean.parent.name != "DIV2K_valid_HR" for item in train[1])


@pytest.mark.parametrize("option, values", [("root", ["a"]), ("root", ["a", "b", "c"]), ("weight", [1.0])])
def test_one_value_for_each_set(option, values):
    args = arguments(data=["sample", "sample"], **{option: values})
    assert f"--{option}" in refusal(data.training_items, args, 0)


@pytest.mark.parametrize("weights", [[0.0, 0.0], [-1.0, 1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_weights_that_share_nothing(weights):
    assert "--weight" in refusal(data.training_items, arguments(data=["sample", "sample"], weight=weights), 0)


# Noise


@pytest.mark.parametrize("sigma", [0, 15, 25, 50, 7.5])
@pytest.mark.parametrize("shape", [(40, 30, 3), (7, 64, 3)])
def test_noise_of_the_tests(sigma, shape):
    clean = picture(0, *shape[:2])
    clean[:2] = [[[0] * 3], [[255] * 3]]
    before = np.random.get_state()[1].copy()
    noisy = data.noisy_version(clean, sigma)
    assert np.array_equal(np.random.get_state()[1], before)                     # the global seed is left alone
    state = np.random.get_state()
    np.random.seed(0)
    expected = clean / 255 + np.random.normal(0, sigma / 255, shape)
    np.random.set_state(state)
    assert noisy.dtype == np.float32 and np.array_equal(noisy, expected.astype(np.float32))
    assert sigma == 0 or (noisy.min() < 0 and noisy.max() > 1)                  # not clipped
    other = data.noisy_version(255 - clean, sigma) - (255 - clean) / 255        # the same noise for each image
    assert np.allclose(noisy - clean / 255, other, atol=1e-6)


@pytest.mark.parametrize("text, expected", [
    ("25", (25, 25)), ("0", (0, 0)), ("255", (255, 255)), ("0-55", (0, 55)), ("12.5", (12.5, 12.5)), ("5-5", (5, 5)),
    ("0.5-7.25", (0.5, 7.25)), ("0-255", (0, 255))])
def test_sigma_range(text, expected):
    assert data.sigma_range(text) == expected


@pytest.mark.parametrize("text", [
    "", "-", "-5", "5-", "256", "0-256", "55-0", "5-10-15", "x", "5-x", "nan", "0-nan", "inf", "0:55"])
def test_bad_sigma(text):
    with pytest.raises(argparse.ArgumentTypeError, match="0-55"):
        data.sigma_range(text)


def test_options():
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    args = parser.parse_args("--data div2k pairs --root a b --weight 3 1 --sigma 0-55 25 --camera 0.5".split())
    assert args.data == ["div2k", "pairs"] and args.root == ["a", "b"] and args.weight == [3, 1]
    assert args.sigma == [(0, 55), (25, 25)] and args.camera == 0.5 and args.clip_noisy == 0
    assert arguments().sigma == [(20, 20), (35, 35), (50, 50)] and arguments().data == ["sidd"]


@pytest.mark.parametrize("bad", [
    "--data cbsd", "--sigma 300", "--camera 1.5", "--camera -0.1", "--camera nan", "--clip-noisy 2", "--clip-noisy 50"])
def test_bad_options(bad, capsys):
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    with pytest.raises((SystemExit, InputError)):
        data.training_items(parser.parse_args(["--data", "sample", *bad.split()]), 0)
