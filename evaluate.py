"""Sec. 4: scores a model, or searches its noise schedule (Sec. 3.1's "small grid search").

    python evaluate.py --model runs/sidd --data sidd
    python evaluate.py --data images --root CBSD68 --sigma 15 25 50 --steps 20 100
    python evaluate.py --model runs/sidd --data sidd --split train --limit 16 --search-schedule
"""

import argparse
import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from rng import crops, data, metrics, tiling
from rng.controller import STEPS
from rng.errors import InputError, number, script
from rng.pipeline import PEAK, RnG, find_folder, to_pixels

COLUMNS = ("LPIPS", "NIQE", "PSNR", "SSIM", "steps")
ENDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)


@script
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="default", help="model folder, or a model that ships")
    parser.add_argument("--data", choices=data.NAMES, default="sample", help="data set")
    parser.add_argument("--root", help="its folder; datasets/NAME where not given")
    parser.add_argument("--split", choices=["test", "train"], default="test", help="which part of sidd and div2k")
    parser.add_argument("--limit", type=number(int, 1), help="use only so many pictures, spread evenly over the set")
    parser.add_argument("--centre-crop", type=number(int, 1), help="use only the centre of each picture, so many pixels a side")
    parser.add_argument("--sigma", type=number(float, 0, 255), nargs="+",
                        help="std of the Gaussian noise, 0-255 scale; 20 35 50 for div2k, else 15 25 50")
    parser.add_argument("--clip-noisy", action="store_true", help="clip the noisy input and round it to 8 bit")
    parser.add_argument("--metric-patches", action="store_true",
                        help="score 256 x 256 patches, as the paper, not whole images")
    parser.add_argument("--steps", type=number(int, 0, 2000), nargs="*", default=[20, 100],
                        help="fixed step counts to score beside r and RnG")
    parser.add_argument("--detail", type=number(float, 0, 2), default=1.0, help="scale of the generated detail, 0 to 1")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the generated detail")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto",
                        help="auto: bfloat16 where it pays")
    parser.add_argument("--lpips-backbone", help="file with AlexNet's convolutions; fetched once where not given")
    parser.add_argument("--csv", type=Path, default=Path("evaluation.csv"), help="the table as a file")
    parser.add_argument("--search-schedule", action="store_true",
                        help="find the end point of 1 - alpha for each step count by LPIPS, write MODEL/schedule.json; "
                             "on patches of --centre-crop, never on the pictures you test on")
    parser.add_argument("--ends", type=number(float, 1e-6, 0.99), nargs="+", default=ENDS, help="end points to search")
    parser.add_argument("--details", type=number(float, 0, 2), nargs="+", default=[1.0],
                        help="scales of d_0 to search beside them; the paper knows only 1")
    args = parser.parse_args(argv)

    model = RnG.load(args.model, args.device, args.precision)
    some = data.items(args.data, args.root, args.split)
    some = data.evenly(some, args.limit or len(some))
    if some[0].noisy is not None:
        args.sigma = [None]
    elif args.sigma is None:
        args.sigma = [20, 35, 50] if args.data == "div2k" else [15, 25, 50]
    return search_schedule(args, model, some) if args.search_schedule else score(args, model, some)


def inputs(args, item, sigma):
    """-> (clean, noisy): uint8 and, where noise is added, float32 (H, W, 3)."""
    clean, noisy = item.read()
    if args.centre_crop:
        height, width = clean.shape[:2]
        top, left = max(0, height - args.centre_crop) // 2, max(0, width - args.centre_crop) // 2
        here = np.s_[top:top + args.centre_crop, left:left + args.centre_crop]
        clean, noisy = clean[here], noisy if noisy is None else noisy[here]
    if noisy is None:
        noisy = data.noisy_version(clean, sigma)
        noisy = eight_bit(noisy) if args.clip_noisy else noisy
    return clean, noisy


def eight_bit(image):
    """numpy (H, W, 3), uint8 or float in [0, 1] units -> uint8."""
    return image if image.dtype == np.uint8 else to_pixels(image, np.dtype(np.uint8))


def protocol(args, some):
    """One line that says how the numbers below it were made."""
    if args.sigma == [None]:
        noise = "real noise"
    else:
        kept = "clipped and 8-bit" if args.clip_noisy else "float, not clipped"
        noise = f"Gaussian noise, RGB, numpy seed 0 for each image, {kept}"
    part = f"centre {args.centre_crop} x {args.centre_crop}" if args.centre_crop else "whole images"
    patches = ", scored on 256 x 256 patches" if args.metric_patches else ""
    return (f"Protocol: {len(some)} pictures of {args.data}, {part}{patches}; {noise}; output rounded to 8 bit; "
            f"PSNR on RGB, SSIM on luma, LPIPS AlexNet v0.1, NIQE; seed {args.seed}, detail {args.detail:g}.")


def score(args, model, some):
    """Prints the table and writes it as CSV."""
    lpips = metrics.load_lpips(args.lpips_backbone, "cpu")
    methods = {"noisy input": None, "r alone": 0}
    if model.gen:
        methods |= {f"{steps} steps": steps for steps in args.steps}
    if model.gen and model.controller:
        methods["RnG (s chooses)"] = "auto"
    rows = []
    for sigma in args.sigma:
        results = {name: [] for name in methods}
        for n, item in enumerate(some):
            if sys.stderr.isatty():
                print(f"\rsigma {sigma}: picture {n + 1}/{len(some)} \r", end="", file=sys.stderr, flush=True)
            clean, noisy = inputs(args, item, sigma)
            for name, steps in methods.items():
                if steps is None:
                    image, taken = eight_bit(noisy), np.nan
                else:
                    parts = model.denoise(noisy, steps, args.seed, args.detail, parts=True)
                    image, taken = eight_bit(parts.image), parts.steps.mean()
                results[name].append([*measure(args, lpips, image, clean), taken])
        rows += [(sigma, name, *np.mean(values, axis=0)) for name, values in results.items()]
    if len(args.sigma) > 1:
        rows += [("mean", name, *np.mean([row[2:] for row in rows if row[1] == name], axis=0)) for name in methods]
    print(protocol(args, some), end="\n\n")
    print("| sigma | method | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (2 + len(COLUMNS)))
    for sigma, name, *values in rows:
        cells = ["-" if np.isnan(value) else f"{value:.{digits}f}" for value, digits in zip(values, (4, 3, 2, 4, 1))]
        print(f"| {'-' if sigma is None else sigma} | {name} | " + " | ".join(cells) + " |")
    write_whole(args.csv, lambda file: csv.writer(file).writerows([("sigma", "method", *COLUMNS), *rows]))
    return 0


def measure(args, lpips, image, clean):
    """image, clean: uint8 (H, W, 3) -> [LPIPS, NIQE, PSNR, SSIM], nan where a metric is not to be had."""
    x, y = (crops.to_tensor(picture).float()[None] / 255 for picture in (image, clean))
    if args.metric_patches:
        height, width = (side // tiling.PATCH for side in image.shape[:2])
        if not height * width:
            raise InputError("--metric-patches needs pictures of at least 256 x 256 pixels; leave it out")
        x, y = (z.unfold(2, 256, 256).unfold(3, 256, 256)[0].flatten(1, 2).transpose(0, 1).contiguous() for z in (x, y))
    small = min(x.shape[-2:]) < 96 or max(x.shape[-2:]) < 192  # NIQE needs two blocks of 96 x 96
    with torch.no_grad():
        return [lpips(x, y).mean().item() if lpips else np.nan,
                np.nan if small else metrics.niqe(x).mean().item(),
                metrics.psnr(x, y).mean().item(), metrics.ssim(x, y).mean().item()]


def search_schedule(args, model, some):
    """For each step count the end point and detail of lowest mean LPIPS, on one patch from each picture and sigma."""
    if model.gen is None:
        raise InputError("the schedule is searched with g; train it first")
    lpips = metrics.LPIPS(args.lpips_backbone).to(model.device)
    args.centre_crop = min(args.centre_crop or tiling.PATCH, tiling.PATCH)
    pairs = [inputs(args, item, sigma) for sigma in args.sigma for item in some]
    if len({clean.shape for clean, _ in pairs}) > 1:
        raise InputError("the pictures are smaller than the patch; give a smaller --centre-crop")
    if min(pairs[0][0].shape[:2]) < metrics.LPIPS_SIZE:
        raise InputError(f"LPIPS needs patches of at least {metrics.LPIPS_SIZE} pixels; give a larger --centre-crop")
    y = torch.stack([crops.to_tensor(clean).float() / 255 for clean, _ in pairs]).to(model.device)
    x = torch.stack([crops.to_tensor(noisy).float() / PEAK[noisy.dtype] for _, noisy in pairs]).to(model.device)
    y_r = torch.cat([model.reconstruct(part) for part in x.split(16)])

    def noise(key, index):
        patches = [tiling.patch_noise(args.seed, key, 2 * i, 0) for i in index]
        return torch.stack(patches)[..., :x.shape[2], :x.shape[3]].to(model.device)

    def mean_lpips(y_hat):
        with torch.no_grad():
            return torch.cat([lpips(a, b) for a, b in zip(y_hat.clamp(0, 1).split(16), y.split(16))]).mean().item()

    print(protocol(args, some) + " In brackets: the best detail.", end="\n\n")
    print("| steps | " + " | ".join(f"end {end:g}" for end in args.ends) + " |\n|" + "---|" * (1 + len(args.ends)))
    found = {"end": {}, "detail": {}}
    for steps in STEPS[1:]:
        scores = []
        for end in args.ends:
            model.ends[steps], model.details[steps] = end, 1.0
            d_0 = model.generate(x, y_r, [steps] * len(x), noise)
            scores.append(min((mean_lpips(y_r + detail * d_0), detail) for detail in args.details))
        found["end"][str(steps)] = args.ends[scores.index(min(scores))]
        found["detail"][str(steps)] = min(scores)[1]
        print(f"| {steps} | " + " | ".join(f"{score:.4f} ({detail:g})" for score, detail in scores) + " |", flush=True)
    print(f"\nr alone: LPIPS {mean_lpips(y_r):.4f}")
    path = find_folder(args.model) / "schedule.json"
    write_whole(path, lambda file: file.write(json.dumps(found, indent=1) + "\n"))
    return 0


def write_whole(path, write):
    """Writes a text file beside its place and renames it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", newline="") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written; is its folder there? ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(main())
