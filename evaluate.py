"""Sec. 4: scores a model, or searches its noise schedule (Sec. 3.1's "small grid search").

    python evaluate.py --model runs/sidd --data sidd
    python evaluate.py --data images --root CBSD68 --sigma 15 25 50 --steps 20 100
    python evaluate.py --data images --root CBSD68 --noise grain jpeg --steps --save noisy_and_clean
    python evaluate.py --data sidd --outputs restormer=results/restormer ldm=results/ldm --plot plane.png
    python evaluate.py --model runs/sidd --data sidd --split train --limit 16 --search-schedule
"""

import csv
import io
import sys
from pathlib import Path

import numpy as np
import torch

from rng import ddpm, figures, folder, metrics, scoring, search, tiling
from rng.pipeline import RnG
from rng.scoring import COLUMNS, Method, Row
from rng.support import charts, data, device
from rng.support.checkpoint import fingerprint
from rng.support.errors import InputError, Parser, make_folder, number, script, write_text
from rng.support.images import check_writable, to_8_bit, to_tensor, write_picture
from rng.support.noise import KINDS

ENDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)  # search.NOISY_ENOUGH needs 0.4 for 10 steps, 0.05 for 100
BEST = "best of these counts for each picture"  # a row of the table


def parse(argv):
    parser = Parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--data", choices=data.NAMES, default="sample", help="data set (default: sample)")
    add("--root", help="its folder (default: datasets/NAME)")
    add("--split", choices=["test", "train"], default="test", help="of sidd and div2k (default: test)")
    add("--limit", type=number(int, 1), help="use only so many pictures, spread evenly over the set")
    add("--centre-crop", type=number(int, 1), help="use only the centre, so many pixels a side")
    add("--sigma", type=number(float, 0, 255), nargs="+",
        help="std of the Gaussian noise, 0-255 scale (default: 20 35 50 for div2k, else 15 25 50)")
    add("--noise", choices=KINDS, nargs="+",
        help="instead noise of these kinds of training's wide mix, its strength drawn for each picture")
    add("--clip-noisy", action="store_true", help="clip the noisy input and round it to 8 bit")
    group = parser.add_argument_group("model")
    device.add_arguments(group)
    add = group.add_argument
    add("--model", default="default", help="model folder, or a model that ships (default: default)")
    add("--steps", type=number(int, 0, 2000), nargs="*", default=[20, 100],
        help="fixed step counts to score beside r and RnG (default: 20 100)")
    add("--detail", type=number(float, 0, 2), nargs="+", default=[1.0],
        help="scales of the generated detail, 0 to 2; a row for each (default: 1)")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="of the generated detail (default: 0)")
    add = parser.add_argument_group("results").add_argument
    add("--metric-patches", action="store_true", help="score 256 x 256 patches, as the paper does")
    add("--outputs", nargs="+", default=[], metavar="NAME=DIR", help="score other methods' pictures too, "
        "with the names of the data set's; for several sigmas in folders DIR/15, DIR/25, ...")
    add("--save", type=Path, help="write every scored picture to this folder")
    add("--csv", type=Path, default=Path("evaluation.csv"), help="the table (default: evaluation.csv)")
    add("--plot", type=Path, help="draw PSNR against LPIPS (Fig. 1) into this PNG")
    add("--figures", type=Path, help="instead of a table draw Figs. 3, 4 (with --outputs: Fig. 6) and 5 into "
                                     "this folder; with --limit 3")
    add("--lpips-backbone", help="file with AlexNet's convolutions (default: fetched once)")
    add = parser.add_argument_group("search").add_argument
    add("--search-schedule", action="store_true",
        help="instead of a table find the end point of 1 - alpha for each step count by LPIPS, write "
             "MODEL/schedule.json; on patches of --centre-crop, never on the pictures you test on")
    add("--ends", type=number(float, 1e-6, 0.99), nargs="+", default=ENDS, help="end points to search")
    add("--variance", choices=ddpm.VARIANCES, default="paper",
        help="variance of the noise that Eq. 3 adds, written to schedule.json (default: paper)")
    return parser.parse_args(argv)


@script
def main(argv=None):
    args = parse(argv)
    if args.search_schedule:
        folder.own(args.model)
    model = RnG.load(args.model, args.device, args.precision, schedule=not args.search_schedule)
    if model.gen is None and (args.search_schedule or args.figures):
        raise InputError("the schedule is searched, and the figures are drawn, with g; train it first")
    every = data.items(args.data, args.root, args.split)
    some = data.evenly(every, args.limit or len(every))
    sigmas = args.noise or args.sigma or ([20.0, 35.0, 50.0] if args.data == "div2k" else [15.0, 25.0, 50.0])
    if some[0].noisy is not None:
        sigmas = [None]
    if args.search_schedule:
        search_schedule(args, model, some, sigmas)
    else:
        (draw if args.figures else score)(args, model, some, every, sigmas)
    return 0


def protocol(args, model, some, sigmas, side, scored):
    """A line that says how the numbers below it were made. side: of a centre crop, or None. scored: how."""
    part = f"centre {side} x {side}" if side else "whole images"
    kept = "clipped and 8-bit" if args.clip_noisy else "float, not clipped"
    added = f"Gaussian noise, RGB, numpy seed 0 for each image, {kept}"
    if sigmas == [None]:
        added = "real noise"
    elif args.noise:
        added = "noise drawn by each image's name" + f", {kept}" * args.clip_noisy
    return (f"Protocol: model {args.model}, precision {args.precision} on {model.device}; {len(some)} "
            f"pictures of {args.data}, {part}; {added}; {scored}; seed {args.seed}.")


def methods(args, model):  # the rows of the table but for --outputs
    own = [Method("ground truth", "truth"), Method("noisy input", "noisy"), Method("r alone", "r", 0)]
    counts = [(f"{T} steps", "fixed", T) for T in args.steps] if model.gen else []
    counts += [("RnG", "auto", "auto")] if model.gen and model.controller else []
    for name, kind, steps in counts:
        own += [Method(name if len(args.detail) == 1 else f"{name}, detail {detail:g}", kind, steps, detail)
                for detail in args.detail]
    return own


def pictures(method, args, model, clean, noisy, theirs):
    """A row's pictures, uint8 (N, H, W, 3), and each one's mean steps; theirs: {method: picture} of each."""
    no_steps = np.full(len(clean), np.nan)
    if method.kind == "other":
        return np.stack([of_one[method.name] for of_one in theirs]), no_steps
    if method.steps is None:
        return clean if method.kind == "truth" else to_8_bit(noisy), no_steps
    parts = model.denoise(noisy, method.steps, args.seed, method.detail, parts="steps")
    return to_8_bit(parts.image), parts.steps.mean(axis=(1, 2))


def score(args, model, some, every, sigmas):
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
    own = methods(args, model)
    outputs = scoring.named_folders(args.outputs, [BEST, *(method.name for method in own)])
    rows, without_niqe = [], {}
    for sigma in sigmas:
        files = {name: scoring.output_files(scoring.sigma_folder(path, sigma, sigmas), some, every)
                 for name, path in outputs.items()}
        results = {method: [] for method in [*own, *(Method(name, "other") for name in files)]}
        inputs = scoring.stacks(some, model.batch, sigma, args.centre_crop, args.clip_noisy)
        for items, clean, noisy in inputs:
            if sys.stderr.isatty():
                print(f"sigma {sigma}: {items[0].name}\033[K\r", end="", file=sys.stderr, flush=True)
            theirs = [scoring.outputs(files, item, args.centre_crop) for item in items]
            for method, values in results.items():
                made = pictures(method, args, model, clean, noisy, theirs)
                for item, y, image, taken in zip(items, clean, *made):
                    values.append([*scoring.measure(lpips, image, y, args.metric_patches), taken])
                    if np.isnan(values[-1][COLUMNS.index("NIQE")]):
                        without_niqe[item.name] = None
                    if args.save:
                        path = scoring.sigma_folder(args.save / method.name, sigma, sigmas)
                        make_folder(path)
                        write_picture(path / f"{Path(item.name).stem}.png", image)
        rows += [Row(sigma, method, *scoring.mean(values)) for method, values in results.items()]
        fixed = np.array([values for method, values in results.items() if method.kind in ("r", "fixed")])
        if lpips and len(args.detail) == 1 and len(fixed) > 2:  # (counts, pictures, columns)
            best = fixed[fixed[..., 0].argmin(axis=0), np.arange(len(some))]
            rows.append(Row(sigma, Method(BEST, "best"), *scoring.mean(best)))
    last = rows[-len(rows) // len(sigmas):]
    if len(sigmas) > 1:
        last = [Row("mean", row.method, *scoring.mean([of_one[2:] for of_one in rows
                                                       if of_one.method == row.method])) for row in last]
        rows += last
    scored = "output rounded to 8 bit; PSNR on RGB, SSIM on luma, LPIPS AlexNet v0.1, NIQE"
    scored += ", of 256 x 256 patches" if args.metric_patches else ""
    print(protocol(args, model, some, sigmas, args.centre_crop, scored), end="\n\n")
    header = "noise" if args.noise else "sigma", "method", *COLUMNS
    print(f"| {' | '.join(header)} |\n|" + "---|" * len(header))
    for sigma, method, *values in rows:
        cells = ["-" if np.isnan(value) else f"{value:.{digits}f}"
                 for value, digits in zip(values, (4, 3, 2, 4, 1))]
        print(f"| {scoring.named(sigma)} | {method.name} | " + " | ".join(cells) + " |")
    if without_niqe:
        print("\nNIQE has no value for these, flat or under two blocks of 96 pixels: "
              f"{', '.join(without_niqe)}")
    chosen, fixed = ([row.steps for row in last if row.method.kind == kind] for kind in ("auto", "fixed"))
    if chosen and fixed:  # the rows of Table 5
        nearest = min(fixed, key=lambda steps: abs(steps - chosen[0]))
        print(f"\nThe fixed count nearest to RnG's mean of {chosen[0]:.1f} steps: {nearest:g} steps.")
    table = io.StringIO()
    lines = [(scoring.named(sigma), method.name, *values) for sigma, method, *values in rows]
    csv.writer(table, lineterminator="\n").writerows([header, *lines])
    write_text(args.csv, table.getvalue())
    if args.plot:
        shown = [row for row in last if row.method.kind not in ("noisy", "truth") and np.isfinite(row.psnr)]
        title = "" if sigmas == [None] else f"{header[0]} {scoring.named(last[0].sigma)}"
        write_picture(args.plot, np.asarray(figures.perception_distortion(shown, title)))


def draw(args, model, some, every, sigmas):
    """The paper's Figs. 3 to 6 for some pictures with the first sigma, into --figures."""
    lpips = metrics.LPIPS(args.lpips_backbone)
    own = methods(args, model)
    outputs = {name: scoring.output_files(scoring.sigma_folder(path, sigmas[0], sigmas), some, every)
               for name, path in scoring.named_folders(args.outputs, [method.name for method in own]).items()}
    own += [Method(name, "other") for name in outputs]
    make_folder(args.figures)
    over_steps, crops_of = [], []
    for item in some:
        clean, noisy = scoring.inputs(item, sigmas[0], args.centre_crop, args.clip_noisy)
        theirs = [scoring.outputs(outputs, item, args.centre_crop)]
        over_steps.append(figures.steps_row(model, lpips, clean, noisy, args.seed))
        named = {method.name: pictures(method, args, model, clean[None], noisy[None], theirs)[0][0]
                 for method in own}
        crops_of.append(figures.crops_row(lpips, named, clean))
        if item is some[0]:
            rows = figures.residual_rows(model, clean, noisy, args.seed)
            write_picture(args.figures / "fig5.png", np.asarray(charts.grid(rows)))
    write_picture(args.figures / "fig3.png", np.asarray(charts.grid(over_steps)))
    write_picture(args.figures / "fig4.png", np.asarray(charts.grid(crops_of)))


def search_schedule(args, model, some, sigmas):
    """Sec. 3.1's grid search on one patch from each picture and sigma; prints it, writes schedule.json."""
    lpips = metrics.LPIPS(args.lpips_backbone).to(model.device)
    side = min(args.centre_crop or tiling.PATCH, tiling.PATCH)
    pairs = [scoring.inputs(item, sigma, side, args.clip_noisy) for sigma in sigmas for item in some]
    if len({clean.shape for clean, _ in pairs}) > 1:
        raise InputError("the pictures are smaller than the patch; give a smaller --centre-crop")
    y, x = (torch.stack([to_tensor(pixels) for pixels in pictures_of]).to(model.device)
            for pictures_of in zip(*pairs))
    print(protocol(args, model, some, sigmas, side, f"LPIPS AlexNet v0.1 of {len(x)} patches"), end="\n\n")
    print("| steps | " + " | ".join(f"end {end:g}" for end in args.ends) + " | chosen |\n|"
          + "---|" * (2 + len(args.ends)))
    of_counts, found = [], folder.Schedules({}, args.variance)
    for T, tried, chosen, values in search.search_schedule(model, lpips, x, y, args.ends, args.variance,
                                                           args.seed):
        of_counts.append(values)
        if T:
            found.ends[T] = chosen
            cells = (f"{tried[end]:.4f}" if end in tried else "-" for end in args.ends)
            print(f"| {T} | " + " | ".join(cells) + f" | {chosen:g} |", flush=True)
    lowest = torch.stack(of_counts).amin(dim=0)
    print(f"\nr alone: {of_counts[0].mean():.4f}; the best count of each patch: {lowest.mean():.4f}")
    folder.save_schedules(folder.find(args.model), found, fingerprint(model.gen))


if __name__ == "__main__":
    sys.exit(main())
