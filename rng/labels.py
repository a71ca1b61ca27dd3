"""Files of step labels (Sec. 3.2): one JSON object a line, MODEL/step_labels.jsonl and one more for each process."""

import json
import os

import numpy as np

from rng import checkpoint, crops
from rng.errors import InputError

FIELDS = {"n", "set", "image", "top", "left", "size", "sigma", "clip", "seed", "gen", "schedule", "lpips"}


def read(folder):
    """All labels of a model folder in the order of their numbers, but for a torn last line.

    InputError if a file is damaged or was made with another gen.pt or schedule.json.
    """
    mine, labels = checkpoint.made_with(folder), {}
    for path in sorted(folder.glob("step_labels*.jsonl")):
        text = path.read_text(errors="replace")
        try:
            found = [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines()]
            if any(not FIELDS <= label.keys() or not {float} <= set(map(type, label["lpips"])) <= {float, type(None)}
                   for label in found):
                raise ValueError("a field is missing, or not a list of numbers")
        except (ValueError, AttributeError, TypeError) as error:
            raise InputError(f"{path} is damaged; remove it and run build_step_labels.py again") from error
        for key, name in (("gen", "gen.pt"), ("schedule", "schedule.json")):
            if any(label[key] != mine[key] for label in found):
                raise InputError(f"{path} was made with another {name}; remove it and run build_step_labels.py again")
        labels |= {label["n"]: label for label in found}
    return [labels[n] for n in sorted(labels)]


def append(path, label):
    """Adds a line."""
    with open(path, "a") as file:
        file.write(json.dumps(label) + "\n")


def drop_torn_line(path):
    """Cuts off an unfinished last line, left by a kill."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def patch(clean, noisy, label):
    """The patch that a label stands for -> (noisy, clean), each float32 (3, size, size) in [0, 1].

    clean, noisy: the pictures it is cut from, uint8 (H, W, 3), noisy None where noise is added.
    """
    place = label["top"], label["left"], label["size"]
    clean, noisy = (picture if picture is None else crops.cut(picture, *place) for picture in (clean, noisy))
    if noisy is None:
        noisy = crops.add_noise(clean, label["sigma"], label["clip"], np.random.default_rng(label["seed"]))
    return crops.to_tensor(noisy), crops.to_tensor(clean)
