"""Files of step labels (Sec. 3.2): one JSON object a line, MODEL/step_labels.jsonl and one more for each process."""

import hashlib
import json
import math
import os

import numpy as np

from rng import checkpoint, crops, tiling
from rng.controller import STEPS
from rng.errors import InputError
from rng.files import append_line


def read(folder):
    """All labels of a model folder in the order of their numbers, but for a torn last line.

    InputError if a file is damaged or was made with another gen.pt or schedule.json.
    """
    mine, labels = checkpoint.made_with(folder), {}
    for path in sorted(folder.glob("step_labels*.jsonl")):
        try:
            text = path.read_text(errors="replace")
            found = [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines()]
            if not all(map(_possible, found)):
                raise ValueError("no label")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path} is damaged; remove it and run build_step_labels.py again") from error
        for key, name in (("gen", "gen.pt"), ("schedule", "schedule.json")):
            if any(label[key] != mine[key] for label in found):
                raise InputError(f"{path} was made with another {name}; remove it and run build_step_labels.py again")
        labels |= {label["n"]: label for label in found}
    return [labels[n] for n in sorted(labels)]


def _possible(label):
    """Whether a line is a label as build_step_labels.py writes it; LookupError or TypeError if it is something else."""
    tried = [value for value in label["lpips"] if value is not None]
    return (all(type(label[key]) is int and label[key] >= 0 for key in ("n", "set", "top", "left", "size", "seed"))
            and 0 < label["size"] <= tiling.PATCH and type(label["image"]) is str and type(label["clip"]) is bool
            and (label["sigma"] in (None, "camera") or 0 <= label["sigma"] <= 255) and {"gen", "schedule"} <= label.keys()
            and len(label["lpips"]) == len(STEPS) and len(tried) > 0
            and all(type(value) is float and 0 <= value < math.inf for value in tried))


def fingerprint(content):
    """Hash of labels or options, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def append(path, label):
    """Adds a line; InputError if the disk is full."""
    append_line(path, json.dumps(label))


def drop_torn_line(path):
    """Cuts off an unfinished last line, left by a kill or a full disk."""
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def patch(clean, noisy, label):
    """The patch that a label stands for -> (noisy, clean), each float32 (3, size, size) in [0, 1].

    clean, noisy: the pictures it is cut from, uint8 (H, W, 3), noisy None where noise is added; InputError if they are
    not those of the label.
    """
    place = top, left, size = label["top"], label["left"], label["size"]
    outside = any(start and start + size > side for start, side in zip((top, left), clean.shape))
    if outside or (noisy is None) != (label["sigma"] is not None):
        raise InputError(f"the picture {label['image']} is not the one of label {label['n']}; "
                         "give the labels' own --data and --root")
    clean, noisy = (picture if picture is None else crops.cut(picture, *place) for picture in (clean, noisy))
    if noisy is None:
        noisy = crops.add_noise(clean, label["sigma"], label["clip"], np.random.default_rng(label["seed"]))
    return crops.to_tensor(noisy), crops.to_tensor(clean)
