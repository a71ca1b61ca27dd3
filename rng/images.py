"""Picture files in and out: PNG, JPEG, TIFF and WebP of 8 bits; grey PNG and grey or RGB TIFF of 16 bits.

Pixels leave here upright (EXIF orientation applied) and as RGB; what else belongs to the file (grey or colour, alpha,
EXIF data, colour profile) travels beside them in a `Picture`, and `write_picture` puts it back.
"""

import logging
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from PIL import ExifTags, Image

from rng.errors import InputError
from rng.files import replacing

EXTENSIONS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP"}
ENCODING = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True, "exact": True}}
MAX_PIXELS = 100_000_000
MAX_SIDE = {"JPEG": 65500, "WEBP": 16383}   # pixels, what libjpeg and libwebp write
MAX_JPEG_EXIF = 65533                       # bytes, one JPEG segment

CONVERTED = {
    "P": "the palette is converted to RGB",
    "PA": "the palette is converted to RGB",
    "CMYK": "CMYK is converted to RGB, without its colour profile",
}
TURNS = {  # EXIF orientation: quarter turns to the left, then mirrored or not
    1: (0, False), 2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False), 7: (1, True), 8: (1, False),
}
EXIF_TAGS = [ExifTags.Base[name] for name in (  # those of the picture; others describe the layout of the old file
    "ImageDescription", "Make", "Model", "XResolution", "YResolution", "ResolutionUnit", "Software", "DateTime",
    "Artist", "HostComputer", "Copyright")]
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TIFF_COMPRESSIONS = (1, 8, 32946, 32773)    # none, Deflate (two numbers), PackBits: those tifffile decodes alone

# What Pillow and tifffile raise on damaged files.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError,
          RuntimeError, MemoryError, struct.error, zlib.error, tifffile.TiffFileError)

Image.MAX_IMAGE_PIXELS = None               # so that MAX_PIXELS decides, and not Pillow's warning or error
logging.getLogger("PIL").setLevel(logging.CRITICAL)       # a damaged file is one sentence, not a log
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


class Picture(NamedTuple):
    """A picture ready for RnG.denoise, and what write_picture needs to make the same kind of file of the result."""

    pixels: np.ndarray                # (H, W, 3) uint8 or uint16; grey is repeated three times
    grey: bool = False
    alpha: np.ndarray | None = None   # (H, W), dtype of pixels
    exif: bytes = b""                 # with orientation 1
    icc: bytes = b""                  # an RGB profile, or a grey one if grey
    notes: tuple = ()                 # sentences for the user: what was converted or left out while reading


def read_rgb(path):
    """Any picture that read_picture reads as uint8 (H, W, 3), RGB, upright: for training and evaluation sets."""
    return to_8_bit(read_picture(path).pixels)


def read_picture(path):
    """The Picture in a file; InputError if the file is missing, damaged, of another kind or over 100 megapixels."""
    try:
        with open(path, "rb") as file:
            head = file.read(25)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror.lower()}; name a picture file") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = _read_tiff16(path) if head.startswith(TIFF_SIGNATURES) else None
            return picture or _read_with_pillow(path, png16=head.startswith(b"\x89PNG") and head[24:] == b"\x10")
    except DAMAGE as error:
        raise InputError(f"cannot read {path}: empty, damaged or not a PNG, JPEG, TIFF or WebP picture") from error


def _read_with_pillow(path, png16):
    """png16: the file is a PNG of 16 bits a channel, which Pillow cuts to 8 unless it is plain grey."""
    with Image.open(path, formats=sorted(set(EXTENSIONS.values()))) as image:
        _check_size(path, *image.size)
        image.load()
        exif, orientation, notes = _read_exif(image.getexif)
        if image.mode in CONVERTED:
            notes.append(CONVERTED[image.mode])
        if getattr(image, "is_animated", False):
            notes.append("only the first of several frames is used")
        transparent = image.has_transparency_data
        if image.mode == "I;16":
            if transparent:
                notes.append("the transparent colour of a 16-bit picture is left out")
            planes = np.array(image)
        else:
            if png16:
                notes.append("16-bit PNG with colour or alpha is read as 8 bit; a 16-bit TIFF keeps all bits")
            mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
            planes = np.array(image.convert(mode + "A" if transparent else mode))
        return _picture(planes, orientation, exif, image.info.get("icc_profile"), notes)


def _read_tiff16(path):
    """The Picture in a 16-bit TIFF, which Pillow would cut to 8 bits; None if the file has 8 bits or fewer."""
    with tifffile.TiffFile(path) as tiff, open(path, "rb") as file:
        page = tiff.pages[0]
        if page.dtype in (np.uint8, np.bool_):
            return None
        _check_size(path, page.imagewidth, page.imagelength)
        white, black, rgb = (tifffile.PHOTOMETRIC[name] for name in ("MINISWHITE", "MINISBLACK", "RGB"))
        colours = {white: 1, black: 1, rgb: 3}.get(page.photometric)
        if not (page.dtype == np.uint16 and page.bitspersample == 16 and page.axes in ("YX", "YXS")
                and page.samplesperpixel - len(page.extrasamples) == colours
                and page.extrasamples in ((), (tifffile.EXTRASAMPLE.UNASSALPHA,))
                and page.compression in TIFF_COMPRESSIONS and not tiff.is_bigtiff):
            raise InputError(f"cannot read {path}: a TIFF of this kind is not supported; save it again as grey or RGB "
                             "of 8 or 16 bits, uncompressed or with Deflate (not LZW)")
        planes = page.asarray()
        if page.photometric == white:
            planes = 65535 - planes
        exif, orientation, notes = _read_exif(lambda: _tiff_exif(file))
        if len(tiff.pages) > 1:
            notes.append("only the first of several pages is used")
        return _picture(planes, orientation, exif, page.iccprofile, notes)


def _tiff_exif(file):
    exif = Image.Exif()
    exif.load_from_fp(file)
    return exif


def _read_exif(load):
    """(EXIF data to keep, orientation 1 to 8, notes) from the Image.Exif that load() returns."""
    try:
        exif = load()
        orientation = exif.get(ExifTags.Base.Orientation)
        kept = Image.Exif()
        kept.update({tag: exif[tag] for tag in EXIF_TAGS if tag in exif})
        for tag in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            group = dict(exif.get_ifd(tag))
            group.pop(ExifTags.IFD.Interop, None)   # an offset into the old file
            if group:
                kept[tag] = group
        if kept:
            kept[ExifTags.Base.Orientation] = 1
        return kept.tobytes() if kept else b"", orientation if orientation in TURNS else 1, []
    except DAMAGE:
        return b"", 1, ["damaged EXIF data is left out"]


def _picture(planes, orientation, exif, icc, notes):
    """planes: (H, W) or (H, W, C) as stored: grey, grey and alpha, RGB, or RGB and alpha."""
    quarters, mirrored = TURNS[orientation]
    planes = np.rot90(planes.reshape(*planes.shape[:2], -1), quarters)
    planes = np.ascontiguousarray(planes[:, ::-1] if mirrored else planes)
    grey = planes.shape[2] < 3
    pixels = np.repeat(planes[..., :1], 3, axis=2) if grey else np.ascontiguousarray(planes[..., :3])
    alpha = planes[..., -1].copy() if planes.shape[2] in (2, 4) else None
    icc = icc if icc and icc[16:20] == (b"GRAY" if grey else b"RGB ") else b""
    return Picture(pixels, grey, alpha, exif, icc, tuple(notes))


def _check_size(path, width, height):
    if width * height > MAX_PIXELS:
        raise InputError(f"{path} has {width} x {height} pixels, more than 100 megapixels; cut it into pieces")


def write_picture(path, pixels, like=None):
    """Writes pixels to a file whose extension names the format; returns notes on what that format cannot keep.

    pixels: (H, W, 3) uint8 or uint16. like: the Picture they come from: grey stays grey (the mean of the channels), and
    alpha, EXIF data and colour profile go along. JPEG has quality 95 without chroma subsampling, WebP is lossless.
    The file appears whole or not at all; InputError if it cannot be written.
    """
    if pixels.dtype not in (np.uint8, np.uint16) or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels must be (H, W, 3) uint8 or uint16, not {pixels.shape} {pixels.dtype}")
    check_writable(path, pixels.shape)
    kind = EXTENSIONS[Path(path).suffix.lower()]
    like = like or Picture(pixels)
    notes = []

    planes = ((pixels.sum(2, np.uint32, keepdims=True) + 1) // 3).astype(pixels.dtype) if like.grey else pixels
    if like.alpha is not None and kind == "JPEG":
        notes.append("JPEG has no alpha channel: it is left out")
    elif like.alpha is not None:
        planes = np.dstack([planes, like.alpha])
    channels = planes.shape[2]
    if planes.dtype == np.uint16 and kind != "TIFF" and (kind, channels) != ("PNG", 1):
        notes.append("written as 8 bit; a 16-bit TIFF keeps all bits")
        planes = to_8_bit(planes)
    with_tifffile = planes.dtype == np.uint16 and channels > 1   # Pillow has 16 bits for one channel only
    exif = like.exif
    if exif and (with_tifffile or (kind == "JPEG" and len(exif) > MAX_JPEG_EXIF)):
        notes.append("this kind of file cannot hold the EXIF data: it is left out")
        exif = b""
    icc = b"" if kind == "WEBP" and like.grey else like.icc      # WebP is always RGB

    try:
        with replacing(path) as temporary:
            if with_tifffile:
                tifffile.imwrite(temporary, planes, photometric="minisblack" if like.grey else "rgb", metadata=None,
                                 planarconfig="contig", extrasamples=["unassalpha"] * (channels in (2, 4)),
                                 iccprofile=icc or None, software=False)
            else:
                image = Image.fromarray(planes[..., 0] if channels == 1 else planes)
                image.save(temporary, kind, exif=exif, icc_profile=icc, **ENCODING.get(kind, {}))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {path}: {error}") from error
    return notes


def check_writable(path, shape=None):
    """InputError unless write_picture could write a picture of this shape (H, W, ...) here: ask before a long run."""
    path = Path(path)
    kind = EXTENSIONS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"cannot write {path}: its name must end in one of {', '.join(EXTENSIONS)}")
    if shape and max(shape[:2]) > MAX_SIDE.get(kind, MAX_PIXELS):
        raise InputError(f"cannot write {path}: {kind} ends at {MAX_SIDE[kind]} pixels a side; take .png or .tif")
    if os.path.isdir(path) or not os.path.isdir(path.parent):
        raise InputError(f"cannot write {path}: name a file in a folder that exists")
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise InputError(f"cannot write {path}: it is read-only; name another file")
    try:
        with replacing(path, keep=False) as temporary, open(temporary, "wb"):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror.lower()}; name another place") from error


def to_8_bit(pixels):
    """uint8 stays; uint16 is rounded to the nearest of 256 levels, which are 257 apart."""
    return pixels if pixels.dtype == np.uint8 else ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
