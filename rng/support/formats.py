"""What Pillow cannot do: say why it refuses a file, find the picture in a TIFF, take colour of 16 bits."""

import re

import numpy as np
import tifffile
from PIL import ExifTags, TiffImagePlugin

from rng.support.errors import InputError

RAW = "a raw file of a camera; develop it first, to PNG, TIFF or JPEG"
CANON = b"II*\0\x10\0\0\0CR", b"\0\0\0\x18ftypcrx "       # how its raw files begin
COLOURS = {0: 1, 1: 1, 2: 3}            # channels by photometric interpretation: white is 0, black is 0, RGB
COMPRESSIONS = (1, 8, 32946, 32773)     # none, Deflate (two numbers), PackBits: those tifffile decodes alone


def refuse(path, head):
    """InputError for HEIC, AVIF and Canon's raw files, by their first bytes."""
    if re.match(rb"ftyp.*(avi[fs]|hei[cmsx]|hev[cmsx]|mif1|msf1)", head[4:], re.DOTALL):
        kind = "AVIF" if b"avi" in head else "HEIC"
        raise InputError(f"cannot read {path}: {kind} is not supported; convert it to PNG or JPEG")
    if head.startswith(CANON):
        raise InputError(f"cannot read {path}: {RAW}")


def unsupported(path, what):
    return InputError(f"cannot read {path}: {what} is not supported; save it again as grey or RGB of 8 bits, "
                      "or as TIFF of 16 bits, uncompressed or with Deflate (not LZW)")


def describe(page):
    colours, compression = (getattr(tag, "name", tag) for tag in (page.photometric, page.compression))
    return f"a TIFF of {page.samplesperpixel} x {page.dtype}, {colours}, compression {compression},"


def choose_page(path, tiff):
    """-> (largest page but for thumbnails and masks, its number if Pillow can read it else None, notes)."""
    pages = list(tiff.pages)
    nested = [inner for page in pages for inner in page.pages or ()]
    if any(page.is_dng or page.photometric in (32803, 34892) for page in pages + nested):  # sensor data
        raise InputError(f"cannot read {path}: {RAW}")
    full = [page for page in pages + nested if not (page.is_reduced or page.is_mask)] or pages
    page = max(full, key=lambda page: page.imagewidth * page.imagelength)
    notes = ["only the first of several pages is used"] * (len(full) > 1)
    if page is not pages[0]:
        notes = ["the first page is not the full picture: the largest page is used"]
    for_pillow = page in pages and page.dtype in (np.uint8, np.bool_)   # it would cut 16 bits to 8
    return page, pages.index(page) if for_pillow else None, notes


def read_page(path, page):
    """(H, W) or (H, W, C) uint8 or uint16: grey or RGB, with or without alpha; InputError for other kinds."""
    if not (page.dtype in (np.uint8, np.uint16) and page.bitspersample == 8 * page.dtype.itemsize
            and page.axes in ("YX", "YXS") and page.extrasamples in ((), (tifffile.EXTRASAMPLE.UNASSALPHA,))
            and page.samplesperpixel - len(page.extrasamples) == COLOURS.get(page.photometric)
            and page.compression in COMPRESSIONS):
        raise unsupported(path, describe(page))
    planes = page.asarray()
    return ~planes if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE else planes


def write_tiff16(file, planes, tags):
    """Writes (H, W, C) uint16, grey or RGB, with or without alpha; tags: as the tiffinfo of Image.save."""
    height, width, channels = planes.shape
    ifd = TiffImagePlugin.ImageFileDirectory_v2()
    layout = {"ImageWidth": width, "ImageLength": height, "BitsPerSample": (16,) * channels, "Compression": 1,
              "PhotometricInterpretation": 1 + (channels > 2), "RowsPerStrip": height, "StripOffsets": 0,
              "StripByteCounts": planes.nbytes, "PlanarConfiguration": 1, "SamplesPerPixel": channels}
    layout |= {"ExtraSamples": 2} if channels in (2, 4) else {}     # alpha, not multiplied into the colours
    for tag, value in (tags | {ExifTags.Base[name]: value for name, value in layout.items()}).items():
        ifd[tag] = value
    ifd.save(file)                      # sets StripOffsets to its end
    file.write(np.ascontiguousarray(planes, "<u2"))
