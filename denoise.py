"""Denoise a picture, or every picture of a folder (Algorithm 1).

    python denoise.py noisy.jpg clean.png
    python denoise.py photos denoised --steps 20 --detail 0.5
    python denoise.py noisy.jpg clean.png --save-parts parts --compare crops.png

PNG, JPEG, TIFF and WebP; the extension of OUT names the format. Grey, alpha, 16 bits, EXIF data and colour
profile are kept where that format can store them; a note names what it cannot store.
"""

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from rng import figures
from rng.pipeline import RnG
from rng.support import device
from rng.support.data import left_out, pictures_in
from rng.support.errors import InputError, Parser, make_folder, number, script
from rng.support.images import EXTENSIONS, check_writable, read_picture, to_8_bit, write_picture
from rng.tiling import OVERLAP, STRIDE


def steps_or_auto(text):
    if text == "auto":
        return text
    if not (text.isdecimal() and int(text) <= 2000):
        raise argparse.ArgumentTypeError(f"{text} is not possible, give auto or a whole number up to 2000")
    return int(text)


def parse(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("input", metavar="IN", type=Path, help="a picture, or a folder of pictures")
    add("output", metavar="OUT", type=Path, help="the file to write, or the folder, if IN is a folder")
    add("--steps", default="auto", metavar="auto|N", type=steps_or_auto,
        help="steps for every patch, 0 to 2000; auto lets the step controller choose (default)")
    add("--detail", type=number(float, 0, 2), default=1.0,
        help="how much generated detail to add: 0 (reconstruction alone) to 2 (default: 1)")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="of the generated detail (default: 0)")
    add("--model", default="default", help="model folder, or a model that ships (default: default)")
    device.add_arguments(parser)
    add("--batch", type=number(int, 1), help="patches per network call (default: a constant per device)")
    add("--overwrite", action="store_true", help="allow OUT to be IN itself")
    add("--resume", action="store_true", help="leave out pictures whose result is there already")
    add("--compare", type=Path, metavar="FILE",
        help="also write noisy, r and RnG side by side, enlarged where g adds most; for one picture")
    add("--save-parts", type=Path, metavar="DIR",
        help="also write NAME_recon.png, NAME_residual.png (0.5 + 4 x residual), NAME_steps.png (black 0, "
             "white 100 steps)")
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        raise InputError("--resume leaves results alone and --overwrite replaces inputs; give one of them")
    if args.compare and args.input.is_dir():
        raise InputError("--compare is for one picture; name one")
    return args


def plan(source, out, parts_folder, compare, overwrite):
    """[(picture, its result, files of --save-parts and --compare)]; refuses to write over an input."""
    if not os.path.exists(source):
        raise InputError(f"{source} does not exist; name a picture, or a folder of pictures")
    is_folder = source.is_dir()
    sources = pictures_in(source) if is_folder else [source]
    if not sources:
        raise InputError(f"{source} holds no picture{left_out(source)}; supported are "
                         f"{', '.join(EXTENSIONS)}")
    if is_folder and left_out(source):
        print(f"note: {source}: left out{left_out(source)}", file=sys.stderr)

    stems = Counter(path.stem for path in sources)
    jobs = []
    for path in sources:
        name = path.stem if stems[path.stem] == 1 else path.name
        parts = [parts_folder / f"{name}_{part}.png"
                 for part in ("recon", "residual", "steps")] if parts_folder else []
        parts += [compare] if compare else []
        jobs.append((path, out / path.name if is_folder else out, parts))

    written = [target for _, result, parts in jobs for target in (result, *parts)]
    inputs = {file_identity(path) for path in sources}
    for target in written:
        if os.path.exists(target) and file_identity(target) in inputs and not overwrite:
            raise InputError(f"{target} is an input as well; give --overwrite to replace it, or name "
                             "another OUT")
    if len({os.path.realpath(target) for target in written}) < len(written):
        raise InputError("results and parts would replace each other; give --save-parts a folder of its own, "
                         "and --compare a file")
    return jobs


def file_identity(path):
    """The same for all names and links of one file."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def progress_line(name):
    """For RnG.denoise: keeps one line on the terminal, gone when all is done; None without a terminal."""
    if not sys.stderr.isatty():
        return None
    start = time.perf_counter()

    def show(done):
        left = (time.perf_counter() - start) * (1 - done) / done
        line = f"{name}: {100 * done:.0f} %, {left:.0f} s left" if done < 1 else ""
        print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)

    return show


def steps_picture(steps, height, width):
    """The step map as a picture, uint8 (height, width, 3): black 0, white 100 steps; steps: int (rows, cols).

    Neighbouring blocks meet in the middle of their patches' overlap.
    """
    levels = np.minimum(255, np.round(2.55 * steps)).astype(np.uint8)
    rows, cols = (np.clip((np.arange(side) - OVERLAP // 2) // STRIDE, 0, count - 1)
                  for side, count in zip((height, width), steps.shape))
    return np.repeat(levels[rows][:, cols, None], 3, axis=2)


def residual_picture(residual):
    """What g added as a picture: four times as strong around grey; float16 (H, W, 3) -> uint8."""
    picture = np.empty(residual.shape, np.uint8)
    for top in range(0, len(residual), STRIDE):  # in bands: float32 takes four times the picture's memory
        band = residual[top:top + STRIDE].astype(np.float32)
        picture[top:top + STRIDE] = (255 * np.clip(0.5 + 4 * band, 0, 1)).round()
    return picture


def used_span(pixels):
    """(low, high) of a 16-bit picture using under a quarter of its range, as from a microscope, else None."""
    if pixels.dtype != np.uint16:
        return None
    some = pixels[::max(1, len(pixels) // 1000)]
    low, high = np.quantile(some, (0.001, 0.999))  # a few stars may lie above
    room = 0.1 * (high - low)
    return (low - room, high + room) if 0 < high - low < 65535 / 4 else None


def between(pixels, span):
    """uint16 pixels, `span` stretched to their full range -> (stretched, the function that undoes it)."""
    levels, (low, high) = np.arange(65536), span
    there = (np.clip((levels - low) / (high - low), 0, 1) * 65535).round().astype(np.uint16)
    back = np.clip(levels / 65535 * (high - low) + low, 0, 65535).round().astype(np.uint16)
    return there[pixels], lambda result: np.where(pixels > high, pixels, back[result])


def denoise(model, source, target, part_files, args):
    """One picture, from file to file."""
    start = time.perf_counter()
    picture = read_picture(source)
    for path in (target, *part_files):
        make_folder(path.parent)
        check_writable(path, picture.pixels.shape)

    pixels, undo, notes = picture.pixels, lambda result: result, list(picture.notes)
    if span := used_span(pixels):
        pixels, undo = between(pixels, span)
        notes.append("it uses a small part of its 16 bits: denoised over {:.0f} to {:.0f}".format(*span))
    result = model.denoise(pixels, args.steps, args.seed, args.detail, progress_line(source.name),
                           parts=bool(part_files) or "steps")
    notes += write_picture(target, undo(result.image), picture)
    height, width = picture.pixels.shape[:2]
    if args.save_parts:
        recon, residual, steps = part_files[:3]
        write_picture(recon, undo(result.recon), picture)
        write_picture(residual, residual_picture(result.residual))
        write_picture(steps, steps_picture(result.steps, height, width))

    if args.compare:
        shown = [to_8_bit(image) for image in (pixels, result.recon, result.image)]  # a small part stretched
        write_picture(part_files[-1], np.asarray(figures.comparison(*shown)))

    for note in notes:
        print(f"note: {source.name}: {note}", file=sys.stderr)
    seconds = time.perf_counter() - start
    name = source.name.encode(errors="replace").decode()  # not every file name can be printed
    print(f"{name}: {width} x {height}, {result.steps.mean():.1f} steps, {seconds:.1f} s", flush=True)


@script
def main(argv=None):
    args = parse(argv)
    jobs = plan(args.input, args.output, args.save_parts, args.compare, args.overwrite)
    model = RnG.load(args.model, args.device, args.precision, args.batch)
    failures = []
    for source, target, part_files in jobs:
        if args.resume and all(os.path.exists(path) for path in (target, *part_files)):
            continue
        try:
            denoise(model, source, target, part_files, args)
        except InputError as error:
            failures.append(str(error))
    for sentence in dict.fromkeys(failures):  # a fault of the model is the same for every picture
        print(f"error: {sentence}", file=sys.stderr)
    return 2 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
