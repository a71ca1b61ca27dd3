"""Labels for the step controller (Sec. 3.2): the LPIPS of 0, 10, ..., 100 inverse steps on many patches.

    python build_step_labels.py --data sidd --model runs/sidd
    python build_step_labels.py --data sample --model runs/try --patches 20 --size 128

Each patch is one line of MODEL/step_labels.jsonl, so the same command goes on where it was stopped. Under
torchrun each process makes its share of the patches, on a GPU of its own; those after the first write
MODEL/step_labels.N.jsonl. Pictures that cannot be read are named at the end; other patches are made.
"""

import functools
import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from rng import folder, metrics, search, tiling
from rng.controller import STEPS
from rng.pipeline import RnG
from rng.support import data
from rng.support.checkpoint import fingerprint
from rng.support.crops import LABELS, random_place
from rng.support.device import add_arguments as add_device_arguments
from rng.support.device import rank, wait_for_all, world_size
from rng.support.errors import InputError, Parser, append_line, number, script
from rng.support.noise import NoiseMix, draw_kind


def parse(argv):
    parser = Parser(__doc__)
    data.add_arguments(parser)
    add = parser.add_argument_group("patches").add_argument
    add("--patches", type=number(int, 1), default=20000, help="how many patches (default: 20000)")
    add("--size", type=number(int, 64, tiling.PATCH), default=256,
        help="side of a patch, 64 to 256 pixels (default: 256)")
    add("--counts", type=int, choices=STEPS, nargs="+", default=STEPS,
        help="step counts to try (default: the paper's 11); fewer are faster, and s then chooses among them")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="of patches and noise (default: 0)")
    group = parser.add_argument_group("run")
    add_device_arguments(group)
    add = group.add_argument
    add("--model", type=Path, required=True, help="model folder, written to")
    add("--lpips-backbone", help="file with AlexNet's convolutions (default: fetched once)")
    return parser.parse_args(argv)


@script
def main(argv=None):
    args = parse(argv)
    counts = sorted(set(args.counts))
    model_folder = folder.own(args.model)
    model = RnG.load(model_folder, args.device, args.precision)
    lpips = metrics.LPIPS(args.lpips_backbone).to(model.device)
    sets, _ = data.training_sets(args.data, args.root)
    weights = data.weights_of(args) / data.weights_of(args).sum()
    options = fingerprint([args.data, weights.tolist(), args.noise, args.sigma, args.camera, args.clip_noisy,
                           args.size, counts, args.seed])
    path = model_folder / (f"step_labels.{rank()}.jsonl" if rank() else "step_labels.jsonl")
    found = search.read_labels(model_folder)
    if any(label.options != options for label in found):
        raise InputError(f"{model_folder} holds labels of another --data, --weight, --noise, --sigma, "
                         "--camera, --clip-noisy, --size, --counts or --seed; give the same ones, remove "
                         "step_labels*.jsonl, or name another --model folder")
    search.drop_torn_line(path)
    made_with = {**folder.made_with(model_folder), "options": options}
    mine, done = range(rank(), args.patches, world_size()), {label.n for label in found}
    todo = [n for n in mine if n not in done]
    todo.sort(key=lambda n: draw_item(args, sets, weights, n)[:2])  # so that each picture is decoded once
    together = max(1, model.batch * tiling.PATCH ** 2 // args.size ** 2)
    started, failures = time.time(), []
    for first in range(0, len(todo), together):
        drawn = []
        for n in todo[first:first + together]:
            try:
                drawn.append(draw_patch(args, sets, weights, n, made_with))
            except InputError as error:
                failures.append(str(error))
        if drawn:
            labels, noisy, clean = zip(*drawn)
            of_each = search.label_patches(model, lpips, torch.stack(noisy), torch.stack(clean),
                                           [label.seed for label in labels], counts)
            for label, values in zip(labels, of_each):
                append_line(path, json.dumps(label._replace(lpips=values)._asdict()))
        report(len(mine), len(todo), min(first + together, len(todo)), started)
    wait_for_all()
    if failures:
        raise InputError(f"{len(failures)} of the patches are not labelled: "
                         f"{'; '.join(dict.fromkeys(failures))}")
    return 0


def draw_item(args, sets, weights, n):
    """-> (place of patch n's data set, its picture's place in it, the generator for what is drawn next)."""
    generator = np.random.default_rng([args.seed, LABELS, n])
    chosen = int(generator.choice(len(sets), p=weights))
    return chosen, int(generator.integers(len(sets[chosen]))), generator


@functools.lru_cache(maxsize=1)
def read(item):
    return item.read()


def draw_patch(args, sets, weights, n, made_with):
    """Patch n, a function of the options -> (its Label without LPIPS, noisy, clean (3, size, size))."""
    chosen, index, generator = draw_item(args, sets, weights, n)
    item = sets[chosen][index]
    clean, noisy = read(item)
    top, left = random_place(clean, args.size, generator)
    sigma, clip, kind = None, False, None
    if noisy is None and args.noise == "wide":
        sigma, kind = "wide", draw_kind(generator)
    elif noisy is None:
        sigma, clip = NoiseMix(args.sigma, args.camera, args.clip_noisy).draw(generator)
    label = search.Label(n, chosen, item.name, top, left, args.size, sigma, clip, kind,
                         int(generator.integers(2 ** 32)), lpips=[], **made_with)
    return label, *search.labelled_patch(clean, noisy, label)


def report(mine, todo, done, started):
    rate = done / (time.time() - started)
    left = timedelta(seconds=round((todo - done) / rate))
    print(f"patch {mine - todo + done}/{mine}  {rate:.2f} patches/s  left {left}",
          end="\033[K\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
