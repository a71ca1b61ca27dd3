"""Labels for the step controller (Sec. 3.2): the LPIPS of 0, 10, ..., 100 inverse steps on many patches.

    python build_step_labels.py --data sidd --model runs/sidd
    python build_step_labels.py --data sample --model runs/try --patches 20 --size 128

Each patch is one line of MODEL/step_labels.jsonl, so the same command goes on where it was stopped. Under torchrun each
process makes its share of the patches, on a GPU of its own; those after the first write MODEL/step_labels.N.jsonl.
"""

import argparse
import sys
import time
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
    labels.drop_torn_line(path)
    done = {label["n"] for label in labels.read(folder)}
    made_with = checkpoint.made_with(folder)
    mine = range(rank, args.patches, distributed.world_size())
    todo = [n for n in mine if n not in done]
    started = time.time()
    for place, n in enumerate(todo):
        generator = np.random.default_rng([args.seed, crops.LABELS, n])
        chosen = int(generator.choice(len(sets), p=weights / weights.sum()))
        item = sets[chosen][generator.integers(len(sets[chosen]))]
        clean, noisy = item.read()
        top, left = crops.random_place(clean, args.size, generator)
        sigma, clip = mix.draw(generator) if noisy is None else (None, False)
        label = {"n": n, "set": chosen, "image": item.name, "top": top, "left": left, "size": args.size, "sigma": sigma,
                 "clip": clip, "seed": int(generator.integers(2 ** 32)), **made_with}
        label["lpips"] = lpips_of_each_step(model, lpips, *labels.patch(clean, noisy, label), label["seed"], counts)
        label["best"] = min(counts, key=lambda T: label["lpips"][STEPS.index(T)])  # ties go to the smaller step
        labels.append(path, label)
        missing = len(todo) - place - 1
        rate = (place + 1) / (time.time() - started)
        remaining = time.strftime("%H:%M:%S", time.gmtime(missing / rate))
        print(f"patch {len(mine) - missing}/{len(mine)}  {rate:.2f} patches/s  left {remaining}",
              end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
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
