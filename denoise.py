"""Denoise a picture, or every picture of a folder (Algorithm 1).

    python denoise.py noisy.jpg clean.png
    python denoise.py photos denoised --steps 20 --detail 0.5
    python denoise.py noisy.jpg clean.png --save-parts parts

PNG, JPEG, TIFF and WebP; the extension of OUT names the format. Grey, alpha, 16 bits, EXIF data and colour profile stay
where that format can hold them; what it cannot hold is said in a note.
"""

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rng.errors import InputError, script
from rng.files import make_folder
from rng.images import EXTENSIONS, check_writable, read_picture, write_picture
from rng.pipeline import RnG
from rng.tiling import OVERLAP, STRIDE


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="IN", type=Path, help="a picture, or a folder of pictures")
    parser.add_argument("output", metavar="OUT", type=Path, help="the file to write, or the folder, if IN is a folder")
    parser.add_argument("--steps", default="auto", metavar="auto|N",
                        help="steps for every patch, 0 to 2000; auto lets the step controller choose (default)")
    parser.add_argument("--detail", type=float, default=1.0,
                        help="how much generated detail to add: 0 (reconstruction alone) to 2, in units of the schedule's own "
                             "(default 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated detail (default 0)")
    parser.add_argument("--model", default="default", help="a model folder, or the name of a model that ships")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="auto (default) takes bfloat16 where it is faster")
    parser.add_argument("--batch", type=int, help="patches per network call (default: a constant per device)")
    parser.add_argument("--overwrite", action="store_true", help="allow OUT to be IN itself")
    parser.add_argument("--resume", action="store_true", help="leave out pictures whose result is there already")
    parser.add_argument("--save-parts", type=Path, metavar="DIR",
                        help="also write NAME_recon.png, NAME_residual.png (0.5 + 4 x residual), NAME_steps.png")
    args = parser.parse_args(argv)

    if args.steps != "auto":
        if not (args.steps.isdecimal() and int(args.steps) <= 2000):
            raise InputError(f"--steps {args.steps} is not possible; give auto or a whole number from 0 to 2000")
        args.steps = int(args.steps)
    if not 0 <= args.detail <= 2:
        raise InputError(f"--detail {args.detail} is not possible; give a number from 0 (reconstruction alone) to 2")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed} is not possible; give a whole number from 0")
    if args.resume and args.overwrite:
        raise InputError("--resume leaves results alone and --overwrite replaces inputs; give one of them")
    if args.batch is not None and args.batch < 1:
        raise InputError(f"--batch {args.batch} is not possible; give a whole number from 1")
    return args


def pictures_in(folder):
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror.lower()}; name another") from error
    files = [file for file in files if file.suffix.lower() in EXTENSIONS and file.is_file() and file.name[0] != "."]
    if not files:
        raise InputError(f"{folder} holds no picture; supported are {', '.join(EXTENSIONS)}")
    return files


def plan(source, out, parts_folder, overwrite):
    """[(picture, its result, the three files of its parts or [])]; refuses what would write over an input."""
    if not os.path.exists(source):
        raise InputError(f"{source} does not exist; name a picture, or a folder of pictures")
    is_folder = source.is_dir()
    sources = pictures_in(source) if is_folder else [source]

    stems = Counter(path.stem for path in sources)
    jobs = []
    for path in sources:
        name = path.stem if stems[path.stem] == 1 else path.name
        parts = [parts_folder / f"{name}_{part}.png" for part in ("recon", "residual", "steps")] if parts_folder else []
        jobs.append((path, out / path.name if is_folder else out, parts))

    written = [target for _, result, parts in jobs for target in (result, *parts)]
    inputs = {file_identity(path) for path in sources}
    for target in written:
        if os.path.exists(target) and file_identity(target) in inputs and not overwrite:
            raise InputError(f"{target} is an input as well; give --overwrite to replace it, or name another OUT")
    if len({os.path.realpath(target) for target in written}) < len(written):
        raise InputError("results and parts would replace each other; give --save-parts a folder of its own")
    return jobs


def file_identity(path):
    """The same for all names and links of one file."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def progress_line(name):
    """Callable for RnG.denoise that keeps one line on the terminal, gone when all is done; None without a terminal."""
    if not sys.stderr.isatty():
        return None
    start = time.perf_counter()

    def show(done):
        left = (time.perf_counter() - start) * (1 - done) / done
        line = f"{name}: {100 * done:.0f} %, {left:.0f} s left" if done < 1 else ""
        print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)

    return show


def steps_picture(steps, height, width):
    """The step map as a picture, uint8 (height, width, 3): a block and a number for each patch, black 0, white 100.

    steps: int (rows, cols). Neighbouring blocks meet in the middle of their patches' overlap.
    """
    picture = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(picture)
    rows, cols = ([0, *(STRIDE * i + OVERLAP // 2 for i in range(1, count)), size]
                  for count, size in zip(steps.shape, (height, width)))
    for (row, col), count in np.ndenumerate(steps):
        top, bottom, left, right = rows[row], rows[row + 1], cols[col], cols[col + 1]
        level = min(255, round(2.55 * count))
        draw.rectangle((left, top, right - 1, bottom - 1), fill=(level,) * 3)
        font = ImageFont.load_default(size=max(1, min(144, right - left, bottom - top) // 3))
        draw.text(((left + right) / 2, (top + bottom) / 2), str(count), fill="white" if level < 128 else "black",
                  font=font, anchor="mm")
    return np.array(picture)


def residual_picture(residual):
    """What g added as a picture: four times as strong around grey; float16 (H, W, 3) -> uint8."""
    picture = np.empty(residual.shape, np.uint8)
    for top in range(0, len(residual), STRIDE):  # in bands: float32 takes four times the memory of the picture
        band = residual[top:top + STRIDE].astype(np.float32)
        picture[top:top + STRIDE] = (255 * np.clip(0.5 + 4 * band, 0, 1)).round()
    return picture


def denoise(model, source, target, part_files, args):
    """One picture, from file to file."""
    start = time.perf_counter()
    picture = read_picture(source)
    if args.input.is_dir():
        make_folder(args.output)
    if part_files:
        make_folder(args.save_parts)
    for path in (target, *part_files):
        check_writable(path, picture.pixels.shape)

    result = model.denoise(picture.pixels, steps=args.steps, seed=args.seed, detail=args.detail, batch=args.batch,
                           progress=progress_line(source.name), parts=bool(part_files) or "steps")
    notes = [*picture.notes, *write_picture(target, result.image, picture)]
    height, width = picture.pixels.shape[:2]
    if part_files:
        recon, residual, steps = part_files
        write_picture(recon, result.recon, picture)
        write_picture(residual, residual_picture(result.residual))
        write_picture(steps, steps_picture(result.steps, height, width))

    for note in notes:
        print(f"note: {source.name}: {note}", file=sys.stderr)
    seconds = time.perf_counter() - start
    name = source.name.encode(errors="replace").decode()  # not every file name can be printed
    print(f"{name}: {width} x {height}, {result.steps.mean():.1f} steps, {seconds:.1f} s", flush=True)


@script
def main(argv=None):
    args = parse(argv)
    jobs = plan(args.input, args.output, args.save_parts, args.overwrite)
    model = RnG.load(args.model, device=args.device, precision=args.precision)
    failures = []
    for source, target, part_files in jobs:
        if args.resume and all(os.path.exists(path) for path in (target, *part_files)):
            continue
        try:
            denoise(model, source, target, part_files, args)
        except InputError as error:
            failures.append(str(error))
    for sentence in dict.fromkeys(failures):        # a fault of the model is the same for every picture: say it once
        print(f"error: {sentence}", file=sys.stderr)
    return 2 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
