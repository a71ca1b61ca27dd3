"""The data sets by name (Sec. 4), and the noise of the Gaussian tests."""

import argparse
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.io
import skimage

from rng.errors import InputError, number
from rng.images import EXTENSIONS, read_rgb

NAMES = ("sidd", "div2k", "pairs", "images", "sample")
SAMPLE = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")


class Item(NamedTuple):
    """One picture of a data set: its name, clean and noisy as file or uint8 (H, W, 3); noisy None: noise is added."""

    name: str
    clean: Path | np.ndarray
    noisy: Path | np.ndarray | None = None

    def read(self):
        """-> (clean, noisy or None), uint8 (H, W, 3)."""
        pictures = [read_rgb(source) if isinstance(source, Path) else source for source in (self.clean, self.noisy)]
        if pictures[1] is not None and pictures[0].shape != pictures[1].shape:
            raise InputError(f"{self.name}: the noisy and the clean picture differ in size; remove or replace the pair")
        return pictures


def _missing(folder, layout, source):
    return InputError(f"{folder} is missing or holds no pictures; expected {layout} ({source}); say where with --root")


def _pictures(folder):
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in files if path.suffix.lower() in EXTENSIONS]


def _sidd_train(root):
    folder = root / "SIDD_Medium_Srgb" / "Data"
    items = []
    for noisy in sorted(folder.glob("*/*NOISY_SRGB_*")):
        clean = noisy.with_name(noisy.name.replace("NOISY", "GT"))
        if not clean.is_file():
            raise InputError(f"{clean} is missing beside {noisy.name}; unpack SIDD again")
        items.append(Item(f"{noisy.parent.name}_{noisy.stem}", clean, noisy))
    if not items:
        raise _missing(folder, "SIDD_Medium_Srgb/Data/SCENE/*NOISY_SRGB_*.PNG and *GT_SRGB_*.PNG",
                       "SIDD-Medium sRGB from https://www.eecs.yorku.ca/~kamel/sidd/")
    return items


def _sidd_test(root):
    blocks = []
    for name in ("ValidationGtBlocksSrgb", "ValidationNoisyBlocksSrgb"):
        path = root / f"{name}.mat"
        if not path.is_file():
            raise _missing(path, "ValidationNoisyBlocksSrgb.mat and ValidationGtBlocksSrgb.mat",
                           "validation data from https://www.eecs.yorku.ca/~kamel/sidd/")
        try:
            blocks.append(scipy.io.loadmat(path)[name])
        except Exception as error:  # a damaged file fails in many ways
            raise InputError(f"{path} is damaged or has no variable {name}; fetch it again") from error
        if blocks[-1].dtype != np.uint8 or blocks[-1].ndim != 5 or blocks[-1].shape != blocks[0].shape:
            raise InputError(f"{path}: {name} should be uint8 (scenes, blocks, 256, 256, 3) in both files; fetch it again")
    clean, noisy = blocks  # (40, 32, 256, 256, 3) uint8
    return [Item(f"{scene:02d}_{block:02d}", clean[scene, block], noisy[scene, block])
            for scene in range(clean.shape[0]) for block in range(clean.shape[1])]


def _div2k(root, folders):
    items = []
    for folder in folders:
        found = [Item(path.stem, path) for path in _pictures(root / folder)]
        if not found:
            raise _missing(root / folder, "DIV2K_train_HR, DIV2K_valid_HR and Flickr2K_HR side by side",
                           "https://data.vision.ee.ethz.ch/cvl/DIV2K/ and https://github.com/limbee/NTIRE2017")
        items += found
    return items


def _pairs(root):
    noisy, clean = ({path.name: path for path in _pictures(root / side)} for side in ("noisy", "clean"))
    if not noisy:
        raise _missing(root / "noisy", "two folders noisy/ and clean/ with the same file names", "your own pairs")
    if noisy.keys() != clean.keys():
        odd = sorted(noisy.keys() ^ clean.keys())[0]
        raise InputError(f"{root}: {odd} is in only one of noisy/ and clean/; the two must hold the same file names")
    return [Item(name, clean[name], path) for name, path in noisy.items()]


def _images(root):
    items = [Item(path.name, path) for path in _pictures(root)]
    if not items:
        raise _missing(root, "a folder of clean PNG, JPEG, TIFF or WebP pictures", "your own pictures")
    return items


def items(name, root=None, split="test"):
    """The items of data set `name` (one of NAMES) under the folder root (default datasets/NAME).

    split: "train" or "test"; only sidd and div2k tell them apart. A missing folder raises InputError, which says the
    layout expected and where the set is published.
    """
    root = Path(root or Path("datasets") / name)
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
    """The options that say which pictures and which noise; see training_items."""
    add = parser.add_argument
    add("--data", nargs="+", choices=NAMES, default=["sidd"], help="one or more data sets")
    add("--root", nargs="+", help="folder of each data set (default: datasets/NAME)")
    add("--weight", nargs="+", type=float, help="share of each data set (default: equal)")
    add("--sigma", nargs="+", type=sigma_range, default=[(20.0, 20.0), (35.0, 35.0), (50.0, 50.0)], metavar="S",
        help="std of the Gaussian noise, 0-255 scale: values, or ranges such as 0-55 (default: 20 35 50)")
    add("--camera", type=number(float, 0, 1), default=0.0, help="probability of camera noise in place of Gaussian")
    add("--clip-noisy", type=number(float, 0, 1), default=0.0, help="probability that a noisy crop is clipped and rounded to 8 bit")


def training_items(args, validation):
    """The sets of add_arguments -> (training items, validation items), each a list of lists.

    Validation comes from the set's own test split, else `validation` items in all are held out evenly.
    """
    for option in ("root", "weight"):
        values = getattr(args, option, None)
        if values and len(values) != len(args.data):
            raise InputError(f"--{option} needs one value for each data set named with --data")
    if not all(0 < weight < np.inf for weight in getattr(args, "weight", None) or []):
        raise InputError("--weight needs positive numbers")
    each = -(-validation // len(args.data))
    splits = [_train_and_validation(name, root, each)
              for name, root in zip(args.data, args.root or [None] * len(args.data))]
    return [train for train, _ in splits], [held_out for _, held_out in splits]


def _train_and_validation(name, root, validation):
    """-> (training items, validation items): the set's own test split, else `validation` items held out evenly.

    Where those are more than half of a small set, a quarter of it.
    """
    train = items(name, root, "train")
    if validation == 0:
        return train, []
    if name in ("sidd", "div2k"):
        return train, evenly(items(name, root, "test"), validation)
    if validation > len(train) // 2:
        validation = max(1, len(train) // 4)
    held_out = evenly(train, validation)
    names = {item.name for item in held_out}
    return [item for item in train if item.name not in names] or train, held_out


def fingerprint(sets):
    """Tells lists of items from others, by the names of their pictures: "432 + 80 pictures, hash 0123456789abcdef"."""
    names = "\n".join(f"{place} {item.name}" for place, some in enumerate(sets) for item in some)
    return f"{' + '.join(str(len(some)) for some in sets)} pictures, hash {hashlib.sha256(names.encode()).hexdigest()[:16]}"


def evenly(sequence, n):
    return [sequence[i * len(sequence) // n] for i in range(min(n, len(sequence)))]


def noisy_version(clean, sigma):
    """Test noise (design of Restormer's protocol): Gaussian, unclipped, numpy's legacy seed 0 anew for every image.

    clean: uint8 (H, W, 3); sigma on the 0-255 scale -> float32 (H, W, 3) in [0, 1] units, values may leave [0, 1].
    """
    eps = np.random.RandomState(0).normal(0, sigma / 255, clean.shape)
    return (clean / 255 + eps).astype(np.float32)
