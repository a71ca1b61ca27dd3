"""The data sets by name (Sec. 4)."""

import argparse
import sys
from collections import Counter
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import numpy as np
import scipy.io
import skimage

from rng.support.device import rank
from rng.support.errors import InputError, number, reading
from rng.support.images import EXTENSIONS, read_rgb

NAMES = ("sidd", "div2k", "pairs", "images", "sample")
SIDD = ("SIDD_Medium_Srgb/Data/SCENE/*NOISY_SRGB_*.PNG and *GT_SRGB_*.PNG for training, "
        "ValidationNoisyBlocksSrgb.mat and ValidationGtBlocksSrgb.mat for the test")
SAMPLE = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")


class Item(NamedTuple):
    """A picture: its name, clean and noisy as file or uint8 (H, W, 3), noisy None where noise is added."""

    name: str
    clean: Path | np.ndarray
    noisy: Path | np.ndarray | None = None

    def read(self):  # -> (clean, noisy or None), uint8 (H, W, 3)
        pictures = [read_rgb(source) if isinstance(source, Path) else source
                    for source in (self.clean, self.noisy)]
        if pictures[1] is not None and pictures[0].shape != pictures[1].shape:
            raise InputError(f"{self.name}: the noisy and the clean picture differ in size; "
                             "remove or replace the pair")
        return pictures


def _missing(root, path, pattern, layout, source):
    """InputError: nothing at root / path fits; what is there instead, and a --root near by where it does."""
    place = next((here for here in (root / path, *(root / path).parents) if here.is_dir()), root)
    found = shorten(", ".join(sorted(file.name for file in place.glob("[!.]*"))), 200) or "nothing"
    there = f"{place} holds {found}" if root.is_dir() else f"there is no folder {root}"
    near = [*sorted(root.glob("[!.]*")), *root.absolute().parents[:2]]  # root is too high, or too deep
    right = [folder for folder in near if any(folder.glob(path + pattern))]
    return InputError(f"{root / path} is missing or holds no pictures: {there}; expected {layout} "
                      f"({source}); " + (f"give --root {right[0]}" if right else "say where with --root"))


def _note(text):
    if rank() == 0:
        print(f"note: {text}", file=sys.stderr)


def pictures_in(folder):
    """A folder's pictures by ending, sorted, but not hidden ones (macOS's ._NAME.png); [] if no folder."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [file for file in files
            if file.suffix.lower() in EXTENSIONS and file.name[0] != "." and file.is_file()]


def left_out(folder):
    """What pictures_in leaves out, "" or " (3 files: 2 .heic, 1 .dng; 1 folder)", without hidden files."""
    taken = set(pictures_in(folder))
    others = [path for path in sorted(folder.iterdir()) if path not in taken and path.name[0] != "."]
    folders = sum(path.is_dir() for path in others)
    endings = Counter(path.suffix.lower() or "no ending" for path in others if not path.is_dir())
    listed = ", ".join(f"{n} {ending}" for ending, n in endings.items())
    files = len(others) - folders
    parts = [f"{files} file{'s' * (files > 1)}: {listed}"] if files else []
    parts += [f"{folders} folder{'s' * (folders > 1)}"] if folders else []
    return f" ({'; '.join(parts)})" if parts else ""


def _sidd_train(root):
    folder = "SIDD_Medium_Srgb/Data"
    items = []
    for scene in sorted((root / folder).glob("[!.]*")):
        for path in pictures_in(scene):
            name, is_noisy = path.name, "NOISY_SRGB_" in path.name
            other = name.replace("NOISY", "GT") if is_noisy else name.replace("GT_SRGB_", "NOISY_SRGB_")
            if not (scene / other).is_file():
                raise InputError(f"{scene / other} is missing beside {name}; expected {SIDD}; "
                                 "unpack SIDD again")
            if is_noisy:
                items.append(Item(f"{scene.name}_{path.stem}", scene / other, path))
    if not items:
        raise _missing(root, folder, "/*/*_SRGB_*", SIDD,
                       "SIDD-Medium sRGB from https://www.eecs.yorku.ca/~kamel/sidd/")
    return items


def _sidd_test(root):
    blocks = []
    for name in ("ValidationGtBlocksSrgb", "ValidationNoisyBlocksSrgb"):
        path = root / f"{name}.mat"
        if not path.is_file():
            raise _missing(root, path.name, "", SIDD, "https://www.eecs.yorku.ca/~kamel/sidd/")
        with reading(f"{path} is damaged or has no variable {name}; fetch it again"):
            blocks.append(scipy.io.loadmat(path)[name])
        if blocks[-1].dtype != np.uint8 or blocks[-1].ndim != 5 or blocks[-1].shape != blocks[0].shape:
            raise InputError(f"{path}: {name} should be uint8 (scenes, blocks, 256, 256, 3) in both files; "
                             "fetch it again")
    clean, noisy = blocks  # (40, 32, 256, 256, 3) uint8
    return [Item(f"{scene:02d}_{block:02d}", clean[scene, block], noisy[scene, block])
            for scene in range(clean.shape[0]) for block in range(clean.shape[1])]


def _div2k(root, folders):
    items = []
    for folder in folders:
        found = [Item(path.name, path) for path in pictures_in(root / folder)]
        if not found and items:
            _note(f"{root / folder} is missing or holds no pictures; going on with DIV2K alone")
        elif not found:
            raise _missing(
                root, folder, "/[!.]*", "DIV2K_train_HR, DIV2K_valid_HR and Flickr2K_HR side by side",
                "https://data.vision.ee.ethz.ch/cvl/DIV2K/ and https://github.com/limbee/NTIRE2017")
        items += found
    return items


def _pairs(root):
    noisy, clean = ({path.name: path for path in pictures_in(root / side)} for side in ("noisy", "clean"))
    if not noisy:
        raise _missing(root, "noisy", "/[!.]*", "two folders noisy/ and clean/ with the same file names",
                       "your own pairs")
    if noisy.keys() != clean.keys():
        odd = sorted(noisy.keys() ^ clean.keys())[0]
        raise InputError(f"{root}: {odd} is in only one of noisy/ and clean/; the two must hold the same "
                         "file names")
    return [Item(name, clean[name], path) for name, path in noisy.items()]


def _images(root):
    items = [Item(path.name, path) for path in pictures_in(root)]
    if not items:
        raise _missing(root, ".", "/[!.]*.[jp]*g", "a folder of clean PNG, JPEG, TIFF or WebP pictures",
                       "your own pictures")
    return items


def _root(name, root):
    return Path(root or Path("datasets") / name)


def items(name, root=None, split="test"):  # split: "train" or "test"; only sidd and div2k tell them apart
    """Data set `name` in root (default datasets/NAME); where missing an InputError says layout and source."""
    root = _root(name, root)
    if name == "sidd":
        return _sidd_train(root) if split == "train" else _sidd_test(root)
    if name == "div2k":
        return _div2k(root, ["DIV2K_train_HR", "Flickr2K_HR"] if split == "train" else ["DIV2K_valid_HR"])
    if name == "pairs":
        return _pairs(root)
    if name == "images":
        return _images(root)
    folder = Path(skimage.__file__).parent / "data"  # the photographs that scikit-image carries
    return [Item(Path(file).stem, folder / file) for file in SAMPLE]


def sigma_range(text):
    """"25" -> (25.0, 25.0); "0-55" -> (0.0, 55.0)."""
    low, dash, high = text.partition("-")
    try:
        low, high = float(low), float(high if dash else low)
    except ValueError:
        low, high = 1, 0
    if not 0 <= low <= high <= 255:
        raise argparse.ArgumentTypeError(f"{text} is not a number or a range such as 0-55, between 0 and 255")
    return low, high


def add_arguments(parser):
    """The options that say which pictures, and which noise where they have none."""
    group = parser.add_argument_group("data and noise")
    add_sets(group)
    add = group.add_argument
    add("--weight", nargs="+", type=number(float, 0), help="share of each data set (default: equal)")
    add("--noise", choices=["gaussian", "wide"], default="gaussian",
        help="gaussian: as the next three say (default); wide: of every kind (rng/support/noise.py)")
    add("--sigma", nargs="+", type=sigma_range, default=[(20.0, 20.0), (35.0, 35.0), (50.0, 50.0)],
        metavar="S", help="std of the Gaussian noise, 0-255 scale: values, or ranges such as 0-55 "
                          "(default: 20 35 50)")
    add("--camera", type=number(float, 0, 1), default=0.0,
        help="probability of camera noise in place of Gaussian (default: 0)")
    add("--clip-noisy", type=number(float, 0, 1), default=0.0,
        help="probability that a noisy crop is clipped and rounded to 8 bit (default: 0)")


def add_sets(group):
    """The options --data and --root."""
    group.add_argument("--data", nargs="+", choices=NAMES, default=["sidd"], help="data sets (default: sidd)")
    group.add_argument("--root", nargs="+", help="folder of each data set (default: datasets/NAME)")


def training_sets(names, roots, validation=0):
    """Data sets by name and folder (None: the default) -> (training items, validation items), set by set."""
    each = -(-validation // len(names))  # validation: items held out of all sets together
    splits = [_train_and_validation(name, root, each)
              for name, root in zip(names, of_each("root", roots, names))]
    return [train for train, _ in splits], [held_out for _, held_out in splits]


def of_each(option, values, names):
    """The values of an option that has one for each data set; None for each where it was not given."""
    if values and len(values) != len(names):
        raise InputError(f"--{option} needs one value for each data set named with --data")
    return values or [None] * len(names)


def weights_of(args):
    """--weight -> array, the share of each data set: 1 for each where it was not given."""
    weights = np.array([1.0 if weight is None else weight
                        for weight in of_each("weight", args.weight, args.data)])
    if not (np.isfinite(weights) & (weights > 0)).all():
        raise InputError("--weight needs positive numbers")
    return weights


def _train_and_validation(name, root, validation):
    """-> (training, validation items): the set's test split, else held out evenly, of SIDD whole scenes."""
    train = items(name, root, "train")
    groups = {}  # SIDD's scene is the second number of its folders, such as 0001_001_S6_00100_00060_3200_L
    for item in train:
        groups.setdefault(item.name.split("_")[1] if name == "sidd" else item.name, []).append(item)
    _note(f"{root or name}: " + f"{len(groups)} scenes, " * (name == "sidd")
          + f"{len(train)} {'pictures' if train[0].noisy is None else 'pairs'}")
    if validation == 0:
        return train, []
    if name == "div2k" or (name == "sidd" and any(_root(name, root).glob("Validation*BlocksSrgb.mat"))):
        return train, evenly(items(name, root, "test"), validation)
    if name == "sidd":
        _note(f"no validation blocks in {_root(name, root)}; whole scenes of training are held out")
    n = -(-validation * len(groups) // len(train))  # if over half of a small set, a quarter is held out
    held_out = evenly(list(groups), n if n <= len(groups) // 2 else max(1, len(groups) // 4))
    rest = [item for group, some in groups.items() if group not in held_out for item in some]
    return rest or train, evenly(sum((groups[group] for group in held_out), []), validation)


def evenly(sequence, n):
    """n items of a sequence, spread over it; all where it has fewer."""
    n = min(n, len(sequence))
    return [sequence[i * len(sequence) // n] for i in range(n)]
