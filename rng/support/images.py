"""Picture files in and out: PNG, JPEG, TIFF and WebP of 8 bits; grey PNG and grey or RGB TIFF of 16 bits.

Pixels leave here upright and as RGB; what else belongs to the file travels beside them, to be put back.
"""

import io
import logging
import warnings
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import tifffile
import torch
from PIL import Image

from rng.support import formats, metadata
from rng.support.errors import InputError, replacing, writing

PEAK = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535, np.dtype(np.float32): 1}  # white
EXTENSIONS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF",
              ".webp": "WEBP"}
ENCODING = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True, "exact": True}}
MAX_PIXELS = 100_000_000
MAX_SIDE = {"JPEG": 65500, "WEBP": 16383}   # pixels, what libjpeg and libwebp write

Image.init()
logging.getLogger("PIL").setLevel(logging.CRITICAL)       # a damaged file is one sentence, not a log
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


class Picture(NamedTuple):
    """A picture ready for RnG.denoise, and what write_picture needs to make the same kind of file of it."""

    pixels: np.ndarray                # (H, W, 3) uint8 or uint16; grey is repeated three times
    grey: bool = False                # one channel in the file
    alpha: np.ndarray | None = None   # (H, W), dtype of pixels
    beside: dict = {}                 # EXIF data, colour profile ...: see metadata.py; never changed
    notes: tuple = ()                 # sentences for the user: what was converted or left out while reading


def read_rgb(path):
    """What read_picture reads, as uint8 (H, W, 3), RGB, upright: for training and evaluation sets."""
    return to_8_bit(read_picture(path).pixels)


def read_picture(path):
    """The Picture in a file; InputError if it is missing, damaged, of another kind or over 100 megapixels."""
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            head = file.read(64)
            formats.refuse(path, head)
            kind = next(kind for kind in set(EXTENSIONS.values()) if Image.OPEN[kind][1](head))
            return _read_tiff(path, file) if kind == "TIFF" else _read_other(path, file, kind, head)
    except InputError:
        raise
    except Exception as error:      # Pillow and tifffile raise many kinds on damaged files
        reason = "empty, damaged or not a PNG, JPEG, TIFF or WebP picture"
        if isinstance(error, OSError) and error.filename:
            reason = f"{error.strerror.lower()}; name a picture file"
        if isinstance(error, MemoryError):
            reason = "too large for the memory of this machine; cut it into pieces"
        raise InputError(f"cannot read {path}: {reason}") from error


def _load(path, file, kind, frame=0, what=""):
    """Pillow's image. what: description used in the error message."""
    file.seek(0)
    try:
        image = Image.OPEN[kind][0](file, "")
    except SyntaxError as error:
        if what or "cannot handle" in str(error):       # a JPEG of 12 bits, or of two channels
            raise formats.unsupported(path, what or f"a JPEG of this kind ({error})") from error
        raise
    image.seek(frame)
    _check_size(path, *image.size)
    image.load()
    return image


def _read_other(path, file, kind, head):
    file.seek(0)
    png = file.read() if kind == "PNG" else b""
    for png, lost in metadata.png_variants(png):
        with suppress(ValueError):      # a text or profile that unfolds to more than Pillow takes
            image = _load(path, io.BytesIO(png) if png else file, kind)
            break
    else:
        raise ValueError("damaged")
    notes = ["only the first of several frames is used"] if getattr(image, "is_animated", False) else []
    found = metadata.read(image.info, png)
    bare = Image.new("1", (1, 1))
    bare.info = image.info      # Pillow reads its EXIF data once more, and says what is damaged
    if png and head[24] == 16 and image.mode != "I;16":
        notes.append("16-bit PNG with colour or alpha is read as 8 bit; a 16-bit TIFF keeps all bits")
        image = image.convert("LA") if head[25] == 4 else image     # Pillow reads grey and alpha as RGBA
    return _picture(_planes(image, notes), bare.getexif, found, notes, lost)


def _read_tiff(path, file):
    with tifffile.TiffFile(path) as tiff:
        page, frame, notes = formats.choose_page(path, tiff)
        _check_size(path, page.imagewidth, page.imagelength)
        if frame is None:
            planes, lost = formats.read_page(path, page), []
        else:
            image = _load(path, file, "TIFF", frame, formats.describe(page))
            planes = _planes(image, notes)
            lost = ["extra bands"] * (page.samplesperpixel > len(image.getbands()))
        found = metadata.read_tiff(page)
        return _picture(planes, lambda: metadata.tiff_exif(tiff, page), found, notes, lost, frame is not None)


def _planes(image, notes):
    """(H, W) or (H, W, C): grey, grey and alpha, RGB, or RGB and alpha."""
    if image.mode == "I;16":
        return np.array(image)
    if image.mode in ("P", "CMYK", "LAB"):
        notes.append(f"{'the palette' if image.mode == 'P' else image.mode} is converted to RGB")
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    return np.array(image.convert(mode + "A" if image.has_transparency_data else mode))


def _picture(planes, load_exif, found, notes, lost, upright=False):
    """planes: as _planes returns them; upright: turned already, by Pillow."""
    orientation, beside, unwritable = metadata.upright(load_exif, found)
    planes, turn = planes.reshape(*planes.shape[:2], -1), 1 if upright else orientation
    planes = planes.swapaxes(0, 1) if turn > 4 else planes
    planes = planes[::-1 if turn in (3, 4, 7, 8) else 1, ::-1 if turn in (2, 3, 6, 7) else 1]
    grey = planes.shape[2] < 3
    pixels = np.repeat(planes[..., :1], 3, axis=2) if grey else np.ascontiguousarray(planes[..., :3])
    alpha = planes[..., -1].copy() if planes.shape[2] in (2, 4) else None
    if beside.get("colour profile", b"")[16:20] not in (b"", b"GRAY" if grey else b"RGB "):
        del beside["colour profile"]
        lost = [*lost, "colour profile (of another kind of picture)"]
    if lost or unwritable:
        notes.append(f"left out: {', '.join([*lost, *unwritable])}")
    return Picture(pixels, grey, alpha, beside, tuple(notes))


def _check_size(path, width, height):
    if width * height > MAX_PIXELS:
        raise InputError(f"{path} has more than 100 megapixels ({width} x {height}); cut it into pieces")


def write_picture(path, pixels, like=None):
    """Writes pixels to a file whose extension names the format; returns notes on what the format cannot hold.

    pixels: (H, W, 3) uint8 or uint16. like: the Picture they come from, whose alpha and metadata go along. If
    it is grey, in one channel or three equal ones, so is the file, by the rounded mean of pixels. JPEG has
    quality 95 and all chroma, WebP is lossless. The file appears whole or not at all, with InputError.
    """
    check_writable(path, pixels.shape)
    kind = EXTENSIONS[Path(path).suffix.lower()]
    like = like or Picture(pixels)
    options, lost = metadata.save_options(kind, like)
    notes = [f"left out, as {kind} cannot hold it: {', '.join(lost)}"] if lost else []

    planes = pixels
    if like.grey or all(np.array_equal(like.pixels[..., 0], like.pixels[..., channel]) for channel in (1, 2)):
        planes = ((pixels.sum(2, np.uint32, keepdims=True) + 1) // 3).astype(pixels.dtype)
        planes = planes if like.grey else planes.repeat(3, axis=2)
    if like.alpha is not None and "alpha channel" not in lost:
        planes = np.dstack([planes, like.alpha])
    channels = planes.shape[2]
    if planes.dtype == np.uint16 and kind != "TIFF" and (kind, channels) != ("PNG", 1):
        notes.append("written as 8 bit; a 16-bit TIFF keeps all bits")
        planes = to_8_bit(planes)
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            if planes.dtype == np.uint16 and channels > 1:
                formats.write_tiff16(file, planes, options["tiffinfo"])
            else:
                image = Image.fromarray(planes[..., 0] if channels == 1 else planes)
                # Not the file itself: through its number Pillow writes unaware of a full disk.
                python = SimpleNamespace(write=file.write, seek=file.seek, tell=file.tell, flush=file.flush)
                image.save(python, kind, **options, **ENCODING.get(kind, {}))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {path}: {error}") from error
    return notes


def check_writable(path, shape=None):
    """InputError unless write_picture can write a picture of this shape (H, W, ...): before a long run."""
    kind = EXTENSIONS.get(Path(path).suffix.lower())
    if kind is None:
        raise InputError(f"cannot write {path}: its name must end in one of {', '.join(EXTENSIONS)}")
    if shape and max(shape[:2]) > MAX_SIDE.get(kind, MAX_PIXELS):
        raise InputError(f"cannot write {path}: {kind} ends at {MAX_SIDE[kind]} pixels a side; take .png")
    with writing(path, "name a file in a folder that exists"):
        with suppress(FileNotFoundError):
            open(path, "r+b").close()       # fails for a folder, a read-only file and a name that is too long
        with replacing(path, keep=False) as temporary:
            temporary.touch()


def to_tensor(pixels):
    """(H, W, 3) uint8, uint16 or float32 with 1 for white -> tensor (3, H, W) float32 in [0, 1] units."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32)
                            / PEAK[pixels.dtype])


def to_pixels(y, dtype):
    """float32 in [0, 1] units, any shape -> clipped, and rounded where dtype is an integer type."""
    y = y.clip(0, 1) * PEAK[np.dtype(dtype)]
    return y.round().astype(dtype) if PEAK[np.dtype(dtype)] > 1 else y


def to_8_bit(pixels):
    """uint8 stays, float32 is clipped and rounded, uint16 goes to the nearest of 256 levels, 257 apart."""
    if pixels.dtype == np.uint16:
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return pixels if pixels.dtype == np.uint8 else to_pixels(pixels, np.uint8)
