"""Labels for the step controller (Sec. 3.2): the LPIPS of 0, 10, ..., 100 inverse steps on many patches.

    python build_step_labels.py --data sidd --model runs/sidd
    python build_step_labels.py --data sample --model runs/try --patches 20 --size 128

Each patch is one line of MODEL/step_labels.jsonl, so the same command goes on where it was stopped. Under torchrun each
process makes its share of the patches, on a GPU of its own; those after the first write MODEL/step_labels.N.jsonl.
A picture that cannot be read is named at the end; the patches of the others are made.
"""

import argparse
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from rng import checkpoint, crops, data, distributed, labels, metrics, tiling
from rng.controller import STEPS
from rng.errors import InputError, number, script
from rng.pipeline import RnG, find_folder


@script
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("runs/rng"), help="model folder (default: runs/rng)")
    data.add_arguments(parser)
    parser.add_argument("--patches", type=number(int, 1), default=20000, help="how many patches (default: 20000)")
    parser.add_argument("--size", type=int, default=256, help="side of a patch, 64 to 256 pixels (default: 256)")
    parser.add_argument("--counts", type=int, choices=STEPS, nargs="+", default=STEPS,
                        help="step counts to try; fewer make more labels in the same time, and s then takes no others; the "
                             "paper tries all 11 (default)")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of patches and noise (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--lpips-backbone", help="file with AlexNet's convolutions (default: fetched once)")
    args = parser.parse_args(argv)
    if not 64 <= args.size <= tiling.PATCH:
        raise InputError(f"--size must lie between 64 and {tiling.PATCH}, not {args.size}")

    counts = sorted(set(args.counts))
    model = RnG.load(args.model, args.device, args.precision)
    lpips = metrics.LPIPS(args.lpips_backbone).to(model.device)
    sets, _ = data.training_items(args, 0)
    weights = np.array(args.weight or [1] * len(sets), float)
    mix = crops.NoiseMix(args.sigma, args.camera, args.clip_noisy)
    folder, rank = find_folder(args.model), distributed.rank()
    path = folder / (f"step_labels.{rank}.jsonl" if rank else "step_labels.jsonl")
    options = labels.fingerprint([args.data, (weights / weights.sum()).tolist(), args.sigma, args.camera, args.clip_noisy,
                                  args.size, counts, args.seed])
    found = labels.read(folder)
    if any(label.get("options", options) != options for label in found):  # labels of old had no such field
        raise InputError(f"{folder} holds labels of another --data, --weight, --sigma, --camera, --clip-noisy, --size, --counts "
                         "or --seed; give the same ones, remove step_labels*.jsonl, or name another --model folder")
    labels.drop_torn_line(path)
    done = {label["n"] for label in found}
    made_with = {**checkpoint.made_with(folder), "options": options}
    mine = range(rank, args.patches, distributed.world_size())
    todo = [n for n in mine if n not in done]
    started, failures = time.time(), []
    for place, n in enumerate(todo):
        generator = np.random.default_rng([args.seed, crops.LABELS, n])
        chosen = int(generator.choice(len(sets), p=weights / weights.sum()))
        item = sets[chosen][generator.integers(len(sets[chosen]))]
        try:
            clean, noisy = item.read()
        except InputError as error:
            failures.append(str(error))
            continue
        top, left = crops.random_place(clean, args.size, generator)
        sigma, clip = mix.draw(generator) if noisy is None else (None, False)
        label = {"n": n, "set": chosen, "image": item.name, "top": top, "left": left, "size": args.size, "sigma": sigma,
                 "clip": clip, "seed": int(generator.integers(2 ** 32)), **made_with}
        label["lpips"] = lpips_of_each_step(model, lpips, *labels.patch(clean, noisy, label), label["seed"], counts)
        label["best"] = min(counts, key=lambda T: label["lpips"][STEPS.index(T)])  # ties go to the smaller step
        labels.append(path, label)
        missing = len(todo) - place - 1
        rate = (place + 1) / (time.time() - started)
        remaining = timedelta(seconds=round(missing / rate))
        print(f"patch {len(mine) - missing}/{len(mine)}  {rate:.2f} patches/s  left {remaining}",
              end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
    distributed.wait_for_all()
    if failures:
        raise InputError(f"{len(failures)} of the patches are not labelled: {'; '.join(dict.fromkeys(failures))}")
    return 0


def lpips_of_each_step(model, lpips, noisy, clean, seed, counts=STEPS):
    """noisy, clean: (3, H, W) in [0, 1]; one noise seed for all step counts -> list of 11 LPIPS values, None where not tried."""
    y = model.at_each_step(noisy[None].to(model.device), seed, counts).clamp(0, 1)  # (N, 3, H, W)
    with torch.no_grad():
        values = lpips(y, clean.expand_as(y).to(model.device)).tolist()
    tried = dict(zip(counts, values))
    return [round(tried[T], 6) if T in tried else None for T in STEPS]


if __name__ == "__main__":
    sys.exit(main())
