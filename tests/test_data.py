"""rng/support/data.py on small folders in the published layouts, the held-out split, and the noise of the
tests."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from rng.support import data
from rng.support.errors import InputError, Parser

MEDIUM, SCENE = "SIDD_Medium_Srgb/Data", "0001_001_S6_00100_00060_3200_L"
BLOCKS = ("ValidationGtBlocksSrgb", "ValidationNoisyBlocksSrgb")


def picture(seed, height=8, width=9):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def touch(root, *names):
    """Names alone: no picture is opened to list or split a data set."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return str(root)


def save_blocks(root, shape=(2, 3, 16, 16, 3), compress=False):
    """The two validation files of SIDD -> (clean, noisy), uint8 (scenes, blocks, size, size, 3)."""
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
            folder = tmp_path / MEDIUM / scene
            noisy, clean = picture([s, n, 0]), picture([s, n, 1])
            save(folder / f"{prefix}NOISY_SRGB_{number}.{extension}", noisy)
            save(folder / f"{prefix}GT_SRGB_{number}.{extension}", clean)
            expected[f"{scene}_{prefix}NOISY_SRGB_{number}"] = clean, noisy
    touch(folder, "../readme.txt", f"._{prefix}NOISY_SRGB_010.PNG", f"._{prefix}GT_SRGB_012.PNG")   # of macOS
    items = data.items("sidd", tmp_path, "train")
    assert sorted(item.name for item in items) == sorted(expected)
    for item in items:
        assert all(np.array_equal(*both) for both in zip(item.read(), expected[item.name]))


PAIR = tuple(f"{MEDIUM}/{SCENE}/0001_{kind}_SRGB_010.PNG" for kind in ("NOISY", "GT"))


@pytest.mark.parametrize("files, says", [
    ([], "{root} holds nothing"),
    ([f"{name}.mat" for name in BLOCKS], "{root} holds ValidationGtBlocksSrgb.mat, "
                                         "ValidationNoisyBlocksSrgb.mat;"),
    (PAIR[:1], "0001_GT_SRGB_010.PNG is missing beside 0001_NOISY_SRGB_010.PNG"),
    (PAIR[1:], "0001_NOISY_SRGB_010.PNG is missing beside 0001_GT_SRGB_010.PNG"),
    ([*PAIR, PAIR[1].replace("010", "011")], "0001_NOISY_SRGB_011.PNG is missing"),
    ([f"{MEDIUM}/{SCENE}/notes.txt"], f"Data holds {SCENE};"),
    ([f"SIDD_Small_sRGB_Only/Data/{SCENE}/NOISY_SRGB_010.PNG"], "{root} holds SIDD_Small_sRGB_Only;"),
    ([f"deep/{name}" for name in PAIR], "give --root {root}/deep"),
    ([f"SIDD_Medium_Srgb/{name}" for name in PAIR], "give --root {root}/SIDD_Medium_Srgb")],
    ids=["empty", "only .mat", "only noisy", "only clean", "one clean", "no pictures", "small", "deep",
         "twice"])
def test_sidd_in_another_layout(tmp_path, files, says):
    touch(tmp_path, *files)
    message = refusal(data.items, "sidd", tmp_path, "train")
    assert says.format(root=tmp_path) in message and f"expected {MEDIUM}/SCENE/*NOISY_SRGB_*.PNG" in message


@pytest.mark.parametrize("root", ["SIDD_Medium_Srgb", MEDIUM])
def test_a_root_inside_sidd_is_told_the_right_one(tmp_path, root):
    touch(tmp_path, *PAIR)
    assert refusal(data.items, "sidd", tmp_path / root, "train").endswith(f"give --root {tmp_path}")


@pytest.mark.parametrize("compress", [False, True])
def test_sidd_validation_blocks(tmp_path, compress):
    clean, noisy = save_blocks(tmp_path, (2, 3, 256, 256, 3), compress)
    items = data.items("sidd", tmp_path)
    assert len(items) == len({item.name for item in items}) == 6
    for n, item in enumerate(items):
        gt, x = item.read()
        assert gt.dtype == x.dtype == np.uint8
        assert np.array_equal(gt, clean[n // 3, n % 3]) and np.array_equal(x, noisy[n // 3, n % 3])


def flipped(content):
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 1]) + content[half + 1:]


DAMAGES = {
    "empty": lambda content: b"", "4 bytes": lambda content: content[:4],
    "half a header": lambda content: content[:100], "header alone": lambda content: content[:128],
    "half": lambda content: content[:len(content) // 2], "end missing": lambda content: content[:-5],
    "zeros": lambda content: bytes(200), "another format": lambda content: b"junk" * 100,
           "a flipped bit": flipped}


@pytest.mark.parametrize("damage, compress", [
    (damage, compress) for damage in DAMAGES for compress in (False, True)
    if compress or damage != "a flipped bit"])  # of what is not compressed it is a pixel
def test_sidd_damaged_blocks(tmp_path, damage, compress):
    save_blocks(tmp_path, compress=compress)
    path = tmp_path / f"{BLOCKS[1]}.mat"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert f"{path} is damaged" in refusal(data.items, "sidd", tmp_path)


@pytest.mark.parametrize("name, blocks, says", [
    ("blocks", picture(0), "has no variable"), (BLOCKS[1], 3.0, "uint8"), (BLOCKS[1], picture(0), "uint8"),
    (BLOCKS[1], np.zeros((1, 3, 16, 16, 3), np.uint8), "uint8"),
                                                (BLOCKS[1], np.zeros((2, 3, 16, 16, 3)), "uint8")],
    ids=["another name", "a number", "one picture", "fewer scenes", "floats"])
def test_sidd_blocks_of_another_kind(tmp_path, name, blocks, says):
    save_blocks(tmp_path)
    scipy.io.savemat(tmp_path / f"{BLOCKS[1]}.mat", {name: blocks})
    message = refusal(data.items, "sidd", tmp_path)
    assert BLOCKS[1] in message and says in message


# DIV2K and Flickr2K, pairs, images, sample


def test_div2k_and_flickr2k(tmp_path, capsys):
    for folder, names in {"DIV2K_train_HR": ("0001", "0800"), "DIV2K_valid_HR": ("0801", "0900"),
                          "Flickr2K_HR": ("000001", "002650")}.items():
        for name in names:
            save(tmp_path / folder / f"{name}.png", picture(int(name)))
        touch(tmp_path / folder, f"._{names[0]}.png")
    train, test = data.items("div2k", tmp_path, "train"), data.items("div2k", tmp_path, "test")
    assert [item.name for item in train] == ["0001", "0800", "000001", "002650"]
    assert [item.name for item in test] == ["0801", "0900"] and capsys.readouterr().err == ""
    for item in train + test:
        clean, noisy = item.read()
        assert np.array_equal(clean, picture(int(item.name))) and noisy is None


def test_div2k_goes_without_flickr2k_but_not_the_other_way(tmp_path, capsys):
    touch(tmp_path / "a", "DIV2K_train_HR/0001.png")
    assert [item.name for item in data.items("div2k", tmp_path / "a", "train")] == ["0001"]
    assert capsys.readouterr().err.startswith(f"note: {tmp_path / 'a' / 'Flickr2K_HR'} is missing")
    touch(tmp_path / "b", "Flickr2K_HR/1.png", "DIV2K/DIV2K_train_HR/1.png")
    message = refusal(data.items, "div2k", tmp_path / "b", "train")
    assert str(tmp_path / "b" / "DIV2K_train_HR") in message
    assert f"--root {tmp_path / 'b' / 'DIV2K'}" in message


def test_pairs_match_by_name(tmp_path):
    for n, name in enumerate(("b.png", "a.tif", "c.PNG")):
        save(tmp_path / "noisy" / name, picture([n, 0]))
        save(tmp_path / "clean" / name, picture([n, 1]))
    touch(tmp_path / "noisy", "Thumbs.db", "._b.png")
    pairs = {item.clean.stem: item.read() for item in data.items("pairs", tmp_path)}
    assert sorted(pairs) == ["a", "b", "c"]
    for n, name in enumerate("bac"):
        clean, noisy = pairs[name]
        assert np.array_equal(noisy, picture([n, 0])) and np.array_equal(clean, picture([n, 1]))


@pytest.mark.parametrize("side, other", [("noisy", "clean"), ("clean", "noisy")])
def test_pairs_name_the_odd_file(tmp_path, side, other):
    touch(tmp_path, *(f"{folder}/{name}.png" for folder in ("noisy", "clean") for name in "ac"),
          f"{side}/b.png")
    assert "b.png" in refusal(data.items, "pairs", tmp_path)
    touch(tmp_path, f"{other}/d.png")   # as many, but not the same
    assert "b.png" in refusal(data.items, "pairs", tmp_path)


def test_images_takes_pictures_only_and_in_order(tmp_path):
    names = ["d.webp", "b.PNG", "a.jpg", "c.tiff", "e.jpeg"]
    touch(tmp_path, *names, "notes.txt", "._a.png", "folder.png/f.png")
    items = data.items("images", tmp_path)
    assert [item.clean.name for item in items] == sorted(names) and all(item.noisy is None for item in items)


@pytest.mark.parametrize("name", ["images", "pairs"])
def test_names_tell_pictures_apart(tmp_path, name):
    """Step labels find their picture by its name."""
    touch(tmp_path, *(f"{folder}{file}" for folder in ("", "noisy/", "clean/")
                      for file in ("1.png", "1.tif")))
    items = data.items(name, tmp_path)
    assert len({item.name for item in items}) == len(items) == 2


def test_sample_is_there():
    items = data.items("sample")
    assert len(items) == len(data.SAMPLE) > 4
    for item in items:
        clean, noisy = item.read()
        assert clean.dtype == np.uint8 and clean.shape[2:] == (3,) and min(clean.shape[:2]) >= 256
        assert noisy is None and (clean[..., 0] != clean[..., 2]).any()   # in colour


@pytest.mark.parametrize("name, split, folder, layout, source", [
    ("sidd", "train", MEDIUM, "NOISY_SRGB", "www.eecs.yorku.ca/~kamel/sidd"),
    ("sidd", "test", "ValidationGtBlocksSrgb.mat", "ValidationNoisyBlocksSrgb.mat",
     "www.eecs.yorku.ca/~kamel/sidd"),
    ("div2k", "train", "DIV2K_train_HR", "Flickr2K_HR", "data.vision.ee.ethz.ch/cvl/DIV2K"),
    ("div2k", "test", "DIV2K_valid_HR", "DIV2K_valid_HR", "data.vision.ee.ethz.ch/cvl/DIV2K"),
    ("pairs", "train", "noisy", "clean/", "own"), ("images", "test", "", "PNG", "own")])
@pytest.mark.parametrize("state", ["absent", "empty", "a file", "default"])
def test_missing_folder_in_one_sentence(tmp_path, monkeypatch, name, split, folder, layout, source, state):
    root = tmp_path / "nowhere"
    if state == "empty":
        (root / folder if not folder.endswith(".mat") else root).mkdir(parents=True)
    elif state == "a file":
        root.write_text("")
    elif state == "default":
        monkeypatch.chdir(tmp_path)
        root = Path("datasets") / name
    message = refusal(data.items, name, None if state == "default" else root, split)
    assert str(root / folder) in message and layout in message and source in message and "--root" in message


def test_item_reads_every_kind_as_rgb(tmp_path):
    save(tmp_path / "grey.png", picture(0)[..., 0])
    save(tmp_path / "alpha.png", np.dstack([picture(0), picture(1)[..., :1]]))
    clean, noisy = data.Item("x", tmp_path / "grey.png", tmp_path / "alpha.png").read()
    assert np.array_equal(clean, picture(0)[..., :1].repeat(3, 2)) and np.array_equal(noisy, picture(0))
    assert data.Item("x", picture(2)).read()[1] is None
    for height in (8, 10):
        assert "wall" in refusal(data.Item("wall", tmp_path / "grey.png", picture(1, height, 8)).read)


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
    scenes_of = [f"{MEDIUM}/{n:04d}_{n % 10 + 1:03d}_S6_00100_00060_3200_L/{n:04d}" for n in range(30)]
    touch(tmp_path, *(f"{scene}_{kind}_SRGB_{shot}.PNG" for scene in scenes_of
                      for kind in ("NOISY", "GT") for shot in ("010", "011")))
    (train,), (held_out,) = data.training_sets(["sidd"], [str(tmp_path)], wanted)
    sides = [{item.name.split("_")[1] for item in items} for items in (train, held_out)]
    assert not sides[0] & sides[1] and len(sides[0]) == 10 - scenes and len(train) == 60 - 6 * scenes
    assert len(held_out) == min(wanted, 6 * scenes) and "whole scenes" in capsys.readouterr().err


def test_validation_is_shared_among_sets(tmp_path):
    roots = [touch(tmp_path / side, *(f"{n}.png" for n in range(30))) for side in "ab"]
    train, held_out = data.training_sets(["images", "sample", "images"], [roots[0], "unused", roots[1]], 7)
    assert [len(items) for items in held_out] == [3, 1, 3] and [len(items) for items in train] == [27, 4, 27]
    assert train[0][0].clean.parent.name == "a" and train[2][0].clean.parent.name == "b"


def test_validation_of_published_splits(tmp_path):
    touch(tmp_path, *PAIR, *(name.replace("010", "011") for name in PAIR), *(
        f"{folder}/{folder}{n}.png" for folder in ("DIV2K_train_HR", "Flickr2K_HR", "DIV2K_valid_HR")
                                                                             for n in (1, 2)))
    save_blocks(tmp_path)
    train, held_out = data.training_sets(["sidd", "div2k"], [str(tmp_path)] * 2, 4)
    assert [len(items) for items in train] == [2, 4] and [len(items) for items in held_out] == [2, 2]
    blocks = data.items("sidd", tmp_path, "test")
    assert [item.name for item in held_out[0]] == [blocks[0].name, blocks[3].name]
    assert all(item.clean.parent.name == "DIV2K_valid_HR" for item in held_out[1])
    assert all(item.clean.parent.name != "DIV2K_valid_HR" for item in train[1])


# Options and noise


def parsed(line):
    parser = Parser("Title.\n\nText")
    data.add_arguments(parser)
    return parser.parse_args(line.split())


def test_options():
    args = parsed("--data div2k pairs --root a b --weight 3 1 --sigma 0-55 25 --camera 0.5")
    assert args.data == ["div2k", "pairs"] and args.root == ["a", "b"]
    assert data.weights_of(args).tolist() == [3, 1]
    assert args.sigma == [(0, 55), (25, 25)] and args.camera == 0.5 and args.clip_noisy == 0
    assert parsed("").sigma == [(20, 20), (35, 35), (50, 50)] and parsed("").data == ["sidd"]
    assert data.weights_of(parsed("--data sample sample")).tolist() == [1, 1]


@pytest.mark.parametrize("bad", [
    "--data cbsd", "--sigma 300", "--camera 1.5", "--camera -0.1", "--camera nan", "--clip-noisy 2",
                                 "--clip-noisy 50",
    "--root a", "--root a b c", "--weight 1", "--weight 0 0", "--weight -1 1", "--weight 1 nan",
                                 "--weight 1 inf"])
def test_bad_options(bad):
    def use(line):
        args = parsed(line)
        data.weights_of(args)
        data.training_sets(args.data, args.root)

    assert bad.split()[0] in refusal(use, f"--data sample sample {bad}")


@pytest.mark.parametrize("sigma", [0, 15, 25, 50, 7.5])
@pytest.mark.parametrize("shape", [(40, 30, 3), (7, 64, 3)])
def test_noise_of_the_tests(sigma, shape):
    clean = picture(0, *shape[:2])
    clean[:2] = [[[0] * 3], [[255] * 3]]
    state = np.random.get_state()
    noisy = data.noisy_version(clean, sigma)
    assert np.array_equal(np.random.get_state()[1], state[1])  # the global seed is left alone
    np.random.seed(0)
    expected = clean / 255 + np.random.normal(0, sigma / 255, shape)
    np.random.set_state(state)
    assert noisy.dtype == np.float32 and np.array_equal(noisy, expected.astype(np.float32))
    assert sigma == 0 or (noisy.min() < 0 and noisy.max() > 1)                  # not clipped
    other = data.noisy_version(255 - clean, sigma) - (255 - clean) / 255  # the same noise for each image
    assert np.allclose(noisy - clean / 255, other, atol=1e-6)


@pytest.mark.parametrize("text, expected", [
    ("25", (25, 25)), ("0", (0, 0)), ("255", (255, 255)), ("0-55", (0, 55)), ("12.5", (12.5, 12.5)),
                                            ("5-5", (5, 5)),
    ("0.5-7.25", (0.5, 7.25)), ("0-255", (0, 255))])
def test_sigma_range(text, expected):
    assert data.sigma_range(text) == expected


@pytest.mark.parametrize("text", [
    "", "-", "-5", "5-", "256", "0-256", "55-0", "5-10-15", "x", "5-x", "nan", "0-nan", "inf", "0:55"])
def test_bad_sigma(text):
    with pytest.raises(argparse.ArgumentTypeError, match="0-55"):
        data.sigma_range(text)
