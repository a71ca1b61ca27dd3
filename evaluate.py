"""Sec. 4: scores a model, or searches its noise schedule (Sec. 3.1's "small grid search").

    python evaluate.py --model runs/sidd --data sidd
    python evaluate.py --data images --root CBSD68 --sigma 15 25 50 --steps 20 100
    python evaluate.py --data sidd --outputs restormer=results/restormer ldm=results/ldm --plot plane.png
    python evaluate.py --model runs/sidd --data sidd --split train --limit 16 --search-schedule
"""

import argparse
import csv
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

from rng import checkpoint, data, ddpm, figures, metrics, panels, scoring, tiling
from rng.controller import STEPS
from rng.errors import InputError, number, script
from rng.files import make_folder, write_text
from rng.images import check_writable, write_picture
from rng.pipeline import PEAK, RnG, find_folder
from rng.search import search

COLUMNS = ("LPIPS", "NIQE", "PSNR", "SSIM", "steps")
# End points of 1 - alpha to search; 10 steps start from noise (search.NOISY_ENOUGH) with 0.4 or more, 100 with 0.05 or more.
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
    parser.add_argument("--detail", type=number(float, 0, 2), nargs="+", default=[1.0],
                        help="scales of the generated detail, times the schedule's own, 0 to 2; a row for each")
    parser.add_argument("--outputs", nargs="+", default=[], metavar="NAME=DIR",
                        help="score other methods' pictures too, with the names of the data set's; for several sigmas in "
                             "folders DIR/15, DIR/25, ...")
    parser.add_argument("--save", type=Path, help="write every scored picture to this folder")
    parser.add_argument("--plot", type=Path, help="draw PSNR against LPIPS (Fig. 1) into this PNG")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the generated detail")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto",
                        help="auto: bfloat16 where it pays")
    parser.add_argument("--lpips-backbone", help="file with AlexNet's convolutions; fetched once where not given")
    parser.add_argument("--csv", type=Path, default=Path("evaluation.csv"), help="the table as a file")
    parser.add_argument("--figures", type=Path,
                        help="instead of a table draw Figs. 3, 4 (with --outputs: Fig. 6) and 5 into this folder; with --limit 3")
    parser.add_argument("--search-schedule", action="store_true",
                        help="find the end point of 1 - alpha for each step count by LPIPS, write MODEL/schedule.json; "
                             "on patches of --centre-crop, never on the pictures you test on")
    parser.add_argument("--ends", type=number(float, 1e-6, 0.99), nargs="+", default=ENDS, help="end points to search")
    parser.add_argument("--details", type=number(float, 0, 2), nargs="+", default=[1.0],
                        help="scales of d_0 to search beside them; the paper knows only 1")
    parser.add_argument("--ramp", type=number(float, 0, 2), nargs=2, metavar=("LOW", "HIGH"),
                        help="instead: d_0 times LOW after 10 steps, rising to HIGH, so that s chooses how much detail a "
                             "patch gets; not in the paper")
    parser.add_argument("--ramp-steps", type=int, choices=STEPS[2:], default=STEPS[-1], help="steps from which it is HIGH")
    parser.add_argument("--variance", choices=ddpm.VARIANCES, default="paper",
                        help="of Eq. 3's noise in the search, kept in schedule.json; the paper knows only the first")
    args = parser.parse_args(argv)
    args.outputs = scoring.named_folders(args.outputs)

    model = RnG.load(args.model, args.device, args.precision, schedule=not args.search_schedule)
    every = data.items(args.data, args.root, args.split)
    some = data.evenly(every, args.limit or len(every))
    if some[0].noisy is not None:
        args.sigma = [None]
    elif args.sigma is None:
        args.sigma = [20, 35, 50] if args.data == "div2k" else [15, 25, 50]
    if args.search_schedule:
        return search_schedule(args, model, some)
    return draw(args, model, some, every) if args.figures else score(args, model, some, every)


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
            f"PSNR on RGB, SSIM on luma, LPIPS AlexNet v0.1, NIQE; seed {args.seed}.")


def score(args, model, some, every):
    """Prints the table of `some` pictures of the set `every` and writes it as CSV."""
    lpips = metrics.load_lpips(args.lpips_backbone, "cpu")
    if not args.csv.parent.is_dir():
        raise InputError(f"cannot write {args.csv}: name a file in a folder that exists")
    if args.plot:
        check_writable(args.plot)
        if not lpips:
            raise InputError("--plot needs LPIPS, and its backbone could not be had; give --lpips-backbone")
    if args.save:
        scoring.by_stem([Path(item.name) for item in some], "the data set")
    outputs = [{name: scoring.output_files(scoring.sigma_folder(folder, sigma, args.sigma), some, every)
                for name, folder in args.outputs.items()} for sigma in args.sigma]
    rows = []
    for sigma, files in zip(args.sigma, outputs):
        results = {}
        for n, item in enumerate(some):
            if sys.stderr.isatty():
                print(f"\rsigma {sigma}: picture {n + 1}/{len(some)} \r", end="", file=sys.stderr, flush=True)
            clean, noisy = scoring.inputs(item, sigma, args.centre_crop, args.clip_noisy)
            theirs = scoring.outputs(files, item, args.centre_crop)
            for name, image, taken in pictures(args, model, clean, noisy, theirs):
                results.setdefault(name, []).append([*scoring.measure(lpips, image, clean, args.metric_patches), taken])
                if args.save:
                    folder = scoring.sigma_folder(args.save / name, sigma, args.sigma)
                    make_folder(folder)
                    write_picture(folder / f"{Path(item.name).stem}.png", image)
        rows += [(sigma, name, *np.mean(values, axis=0)) for name, values in results.items()]
        fixed = np.array([results[name] for name in results if name == "r alone" or name.endswith(" steps")])
        if lpips and len(fixed) > 2:  # (counts, pictures, columns)
            best = fixed[fixed[..., 0].argmin(axis=0), np.arange(len(some))]
            rows.append((sigma, "best of these counts for each picture", *best.mean(axis=0)))
    names = [row[1] for row in rows[:len(rows) // len(args.sigma)]]
    if len(args.sigma) > 1:
        rows += [("mean", name, *np.mean([row[2:] for row in rows if row[1] == name], axis=0)) for name in names]
    print(protocol(args, some), end="\n\n")
    print("| sigma | method | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (2 + len(COLUMNS)))
    for sigma, name, *values in rows:
        cells = ["-" if np.isnan(value) else f"{value:.{digits}f}" for value, digits in zip(values, (4, 3, 2, 4, 1))]
        print(f"| {'-' if sigma is None else sigma} | {name} | " + " | ".join(cells) + " |")
    chosen, fixed = ([row[-1] for row in rows[-len(names):] if re.match(kind, row[1])] for kind in ("RnG", r"\d+ steps"))
    if chosen and fixed:  # the rows of Table 5
        nearest = min(fixed, key=lambda steps: abs(steps - chosen[0]))
        print(f"\nThe fixed count nearest to RnG's mean of {chosen[0]:.1f} steps: {nearest:g} steps.")
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("sigma", "method", *COLUMNS), *rows])
    write_text(args.csv, table.getvalue())
    if args.plot:
        shown = [(name, lpips, psnr) for _, name, lpips, _, psnr, *_ in rows[-len(names):]
                 if name not in ("noisy input", "ground truth") and np.isfinite(psnr)]
        title = "" if args.sigma == [None] else f"sigma {rows[-1][0]}"
        write_picture(args.plot, np.asarray(panels.perception_distortion(shown, title)))
    return 0


def pictures(args, model, clean, noisy, theirs):
    """Yields (name, picture uint8, mean steps or nan) for each row of the table; theirs: {other method: its picture}."""
    yield "ground truth", clean, np.nan
    yield "noisy input", scoring.eight_bit(noisy), np.nan
    counts = {"r alone": 0}
    if model.gen:
        counts |= {f"{steps} steps": steps for steps in args.steps}
    if model.gen and model.controller:
        counts["RnG"] = "auto"
    for name, steps in counts.items():
        parts = model.denoise((noisy / PEAK[noisy.dtype]).astype(np.float32), steps, args.seed, parts=True)
        for detail in args.detail if steps else [1.0]:
            image = scoring.eight_bit(parts.recon + detail * parts.residual)
            yield name if len(args.detail) == 1 or not steps else f"{name}, detail {detail:g}", image, parts.steps.mean()
    for name, image in theirs.items():
        yield name, image, np.nan


def draw(args, model, some, every):
    """The paper's Figs. 3 to 6 for some pictures with the first sigma, into --figures."""
    if model.gen is None:
        raise InputError("the figures show what g does; train it first")
    lpips = metrics.LPIPS(args.lpips_backbone)
    outputs = {name: scoring.output_files(scoring.sigma_folder(folder, args.sigma[0], args.sigma), some, every)
               for name, folder in args.outputs.items()}
    make_folder(args.figures)
    over_steps, crops_of = [], []
    for item in some:
        clean, noisy = scoring.inputs(item, args.sigma[0], args.centre_crop, args.clip_noisy)
        theirs = scoring.outputs(outputs, item, args.centre_crop)
        over_steps.append(panels.steps_row(model, lpips, clean, noisy, args.seed))
        named = {name: image for name, image, _ in pictures(args, model, clean, noisy, theirs)}
        crops_of.append(panels.crops_row(named, clean))
        if item is some[0]:
            write_picture(args.figures / "fig5.png", np.asarray(figures.grid(
                panels.residual_rows(model, clean, noisy, args.seed))))
    write_picture(args.figures / "fig3.png", np.asarray(figures.grid(over_steps)))
    write_picture(args.figures / "fig4.png", np.asarray(figures.grid(crops_of)))
    return 0


def search_schedule(args, model, some):
    """The paper's grid search on one patch from each picture and sigma; prints its table, writes MODEL/schedule.json."""
    if model.gen is None:
        raise InputError("the schedule is searched with g; train it first")
    model.variance = args.variance
    lpips = metrics.LPIPS(args.lpips_backbone).to(model.device)
    args.centre_crop = min(args.centre_crop or tiling.PATCH, tiling.PATCH)
    pairs = [scoring.inputs(item, sigma, args.centre_crop, args.clip_noisy) for sigma in args.sigma for item in some]
    if len({clean.shape for clean, _ in pairs}) > 1:
        raise InputError("the pictures are smaller than the patch; give a smaller --centre-crop")
    y, x = (torch.cat([scoring.to_batch(picture) for picture in some]).to(model.device) for some in zip(*pairs))
    details = {steps: args.details for steps in STEPS[1:]}
    if args.ramp:
        values = np.interp(STEPS[1:], (STEPS[1], args.ramp_steps), args.ramp).round(3).tolist()
        details = {steps: [value] for steps, value in zip(STEPS[1:], values)}
    print(f"{protocol(args, some)} LPIPS over {len(x)} patches, in brackets the best detail.", end="\n\n")
    print("| steps | " + " | ".join(f"end {end:g}" for end in args.ends) + " | chosen |\n|" + "---|" * (2 + len(args.ends)))
    of_counts = []
    for steps, tried, chosen, values in search(model, lpips, x, y, args.ends, details, args.seed):
        of_counts.append(values)
        if steps:
            cells = ("{:.4f} ({:g})".format(*tried[end]) if end in tried else "-" for end in args.ends)
            print(f"| {steps} | " + " | ".join(cells) + f" | {chosen:g} |", flush=True)
    lowest = torch.stack(of_counts).amin(dim=0)
    print(f"\nr alone: {of_counts[0].mean():.4f}; the best count of each patch: {lowest.mean():.4f}")
    found = {"gen": checkpoint.fingerprint(model.gen), "variance": args.variance, "end": model.ends, "detail": model.details}
    write_text(find_folder(args.model) / "schedule.json", json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
